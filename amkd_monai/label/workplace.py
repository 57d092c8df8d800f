"""The folder a server works in: copies of bundles, so that fine-tuning never changes the bundles themselves.

``<work>/main.py`` is what MONAI Label looks for, ``<work>/model/<name>`` are the copies, ``<work>/cache`` holds decoded
images and teachers' targets, ``<work>/logs`` what the server logs.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from amkd_monai.atomic import atomic_path, atomic_write_bytes, atomic_write_json
from amkd_monai.weights import file_sha256

logger = logging.getLogger("amkd_monai")

CONFIGS = ("metadata.json", "inference.json", "train.json")

MAIN = b"""\"\"\"What MONAI Label starts; written by amkd_monai.\"\"\"

from amkd_monai.label.server import end_with_server

end_with_server()

from amkd_monai.label.app import StudentApp

__all__ = ["StudentApp"]
"""


def find_bundles(names: Sequence[str]) -> dict[str, Path]:
    """Find trained bundles by name in ``bundles/`` or by folder.

    Returns:
        Folders by the name of the model, in the order given.

    Raises:
        FileNotFoundError: no such bundle, or it is not trained.
        ValueError: two of one name.
    """
    found: dict[str, Path] = {}
    for name in names:
        folder = next((f for f in (Path("bundles") / name, Path(name)) if (f / "configs").is_dir()), None)
        if folder is None:
            known = ", ".join(sorted(path.parent.name for path in Path("bundles").glob("*/configs"))) or "none here"
            raise FileNotFoundError(f"There is no bundle '{name}': give a folder or one of bundles/ ({known}).")
        folder = folder.resolve()
        for config in CONFIGS:
            if not (folder / "configs" / config).is_file():
                raise FileNotFoundError(f"{folder} is no training bundle, it lacks configs/{config}: give another.")
        if not (folder / "models" / "model.pt").is_file():
            raise FileNotFoundError(
                f"There is no trained student at {folder / 'models' / 'model.pt'}: train the bundle, or put one there."
            )
        if folder.name in found:
            raise ValueError(f"Two bundles are called '{folder.name}': rename one of the folders.")
        found[folder.name] = folder
    return found


def claimed(work: Path) -> FileLock:
    """Return the held lock of a folder to work in; the system frees it when this process ends, even by SIGKILL.

    Raises:
        RuntimeError: another server works there.
    """
    work.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(work / ".lock").acquire(timeout=0).lock
    except Timeout as error:
        raise RuntimeError(f"Another server works in {work}: stop it, or give another folder as --work.") from error


def prepare(bundles: Mapping[str, Path], work: Path) -> Path:
    """Copy bundles into the folder the server works in; a student that was fine-tuned there stays.

    Configs are copied every time. A student is copied if there is none yet; where the bundle's own student is another
    than the one copied then, this is logged.

    Args:
        bundles: folders by the name of the model.
        work: folder to work in, made if it is missing.

    Returns:
        The folder, absolute.
    """
    work = work.resolve()
    for name, source in bundles.items():
        target = work / "model" / name
        shutil.copytree(source / "configs", target / "configs", dirs_exist_ok=True)
        origin = {"student": file_sha256(source / "models" / "model.pt")}
        record = target / "origin.json"
        if not (target / "models" / "model.pt").is_file():
            if (source / "models" / "student.json").is_file():
                with atomic_path(target / "models" / "student.json") as temporary:
                    shutil.copyfile(source / "models" / "student.json", temporary)
            with atomic_path(target / "models" / "model.pt") as temporary:
                shutil.copyfile(source / "models" / "model.pt", temporary)
            atomic_write_json(record, origin)
        elif json.loads(record.read_text(encoding="utf-8")) != origin:
            logger.warning("%s has a new student; remove %s to serve that one.", source, target)
    atomic_write_json(work / "models.json", list(bundles))
    atomic_write_bytes(work / "main.py", MAIN)
    return work
