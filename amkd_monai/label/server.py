"""Start MONAI Label's server on copies of trained bundles: fine-tuning never changes the bundles themselves.

In the work folder, ``main.py`` is what MONAI Label looks for, ``model/<name>`` are the copies, ``cache`` holds decoded
images and teacher outputs, ``logs`` what the server logs.
"""

import importlib.util
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from amkd_monai.files.cases import series_folders
from amkd_monai.files.dicom import holds_series
from amkd_monai.files.names import DICOM_SUFFIX, has_suffix, is_slice
from amkd_monai.storage import atomic_path, atomic_write_bytes, atomic_write_json, exclusive_lock, read_json
from amkd_monai.weights import file_sha256

logger = logging.getLogger("amkd_monai")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVER = "AMKD_LABEL_SERVER"  # environment variable with the server's process id, for the trainers that it starts

MAIN = b"""\"\"\"What MONAI Label starts; written by amkd_monai.\"\"\"

from amkd_monai.label.server import end_with_server

end_with_server()

from amkd_monai.label.app import StudentApp

__all__ = ["StudentApp"]
"""


def serve(bundles: Sequence[str], studies: str, host: str, port: int, work: str | Path) -> None:
    """Serve trained bundles, names in ``bundles/`` or folders; returns when the server is stopped.

    ``studies`` is a folder of images (DICOM series are a ValueError), or the http(s) address of a DICOMweb server.
    ``work`` is the folder for copies, caches and logs, made if it is missing; one server works in it. Without MONAI
    Label it is a RuntimeError, on a port that is taken an OSError.
    """
    found, work = find_bundles(bundles), Path(work).resolve()
    if not studies.startswith(("http://", "https://")) and not Path(studies).is_dir():
        raise FileNotFoundError(f"There is no folder {studies}: give --studies a folder of images.")
    if Path(studies).is_dir():
        _check_dicom(Path(studies))
    if importlib.util.find_spec("monailabel") is None:
        raise RuntimeError("MONAI Label is not installed here: run `make label-env`, then use .venv-label/bin/python.")
    try:
        socket.create_server((host, port)).close()  # ten seconds of imports come before the server's own attempt
    except (OSError, OverflowError) as error:
        raise OSError(f"Port {port} of {host} cannot be used ({error}): give another --port or --host.") from error
    with exclusive_lock(work / ".lock"):
        prepare(found, work)
        _start(work, studies, host, port)


def _check_dicom(studies: Path) -> None:
    """Refuse DICOM that no model would see: series, and files with other names; pictures are served."""
    if series_folders(studies) or holds_series(studies):
        raise ValueError(f"{studies} holds DICOM series, served from DICOMweb alone: convert them to NIfTI or PNG.")
    files = (file for file in studies.iterdir() if file.is_file() and not has_suffix(file, [DICOM_SUFFIX]))
    if other := next(filter(is_slice, files), None):
        raise ValueError(f"{other} is DICOM but not called so: let its name end in {DICOM_SUFFIX}.")


def _start(work: Path, studies: str, host: str, port: int) -> None:
    if host not in LOOPBACK:
        may = "Whoever reaches it can read the studies, save labels and replace models."
        print(f"WARNING: {host} is reachable from outside this machine. {may}", flush=True)
    # MONAI Label reads these when it is imported: no process that scores images after each request, no files elsewhere.
    os.environ.setdefault("MONAI_LABEL_AUTO_UPDATE_SCORING", "false")
    os.environ.setdefault("MONAI_LABEL_SESSION_PATH", str(work / "sessions"))
    from monailabel.main import Main
    from monailabel.utils.async_tasks.utils import background_executors, stop_background_task

    main = Main(actions=("start_server",))
    arguments = ["--app", str(work), "--studies", studies, "--host", host, "--port", str(port)]
    arguments += ["--uvicorn_app", "amkd_monai.label.web:app"]
    os.environ[SERVER] = str(os.getpid())
    try:
        main.action_start_server(main.args_parser().parse_args(["start_server", *arguments]))
    finally:  # the interpreter would wait for the end of a training
        for method, executor in background_executors.items():
            executor.shutdown(wait=False, cancel_futures=True)
            stop_background_task(method)


def end_with_server() -> None:
    """End this process, a trainer, as soon as the server that started it is gone, however that ended.

    What a trainer publishes appears whole or not at all, so that it may end at any moment.
    """
    server = int(os.environ.get(SERVER, os.getpid()))

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(0.2)
        os._exit(1)

    if server != os.getpid():
        threading.Thread(target=watch, daemon=True).start()


def find_bundles(names: Sequence[str]) -> dict[str, Path]:
    """Find trained bundles by name in ``bundles/`` or by folder; return the folders by the name of the model.

    One that is not there or not trained is a FileNotFoundError, two of one name are a ValueError.
    """
    found: dict[str, Path] = {}
    for name in names:
        folder = next((f for f in (Path("bundles") / name, Path(name)) if (f / "configs").is_dir()), None)
        if folder is None:
            known = ", ".join(sorted(path.parent.name for path in Path("bundles").glob("*/configs"))) or "none here"
            raise FileNotFoundError(f"There is no bundle '{name}': give a folder or one of bundles/ ({known}).")
        folder = folder.resolve()
        for file in (*(f"configs/{name}.json" for name in ("metadata", "inference", "train")), "models/model.pt"):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} lacks {file}: train the bundle, or give another one.")
        if folder.name in found:
            raise ValueError(f"Two bundles are called '{folder.name}': rename one of the folders.")
        found[folder.name] = folder
    return found


def prepare(bundles: Mapping[str, Path], work: Path) -> None:
    """Copy bundles into the work folder; a student that was fine-tuned there stays.

    Configs are copied every time, a student only if there is none yet. A warning is logged where the bundle's own
    student is not the one that was copied.
    """
    for name, source in bundles.items():
        target = work / "model" / name
        shutil.copytree(source / "configs", target / "configs", dirs_exist_ok=True)
        origin = {"student": file_sha256(source / "models" / "model.pt")}
        record = target / "origin.json"
        if not (target / "models" / "model.pt").is_file():
            for file in ("student.json", "model.pt"):  # the weights last: their existence says that the copy is whole
                if (source / "models" / file).is_file():
                    with atomic_path(target / "models" / file) as temporary:
                        shutil.copyfile(source / "models" / file, temporary)
            atomic_write_json(record, origin)
        elif read_json(record) != origin:
            logger.warning("%s has a new student; remove %s to serve that one.", source, target)
    atomic_write_json(work / "models.json", list(bundles))
    atomic_write_bytes(work / "main.py", MAIN)
