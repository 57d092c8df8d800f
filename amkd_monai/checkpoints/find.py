"""Where weight files lie: named folders, then the Hugging Face cache. Imports no torch and touches no network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def weights_folders(weights_dir: str | Path | None = None) -> list[Path]:
    """Return the folders searched for weight files: the argument, ``$AMKD_WEIGHTS``, ``weights/``."""
    named = [weights_dir, os.environ.get("AMKD_WEIGHTS"), "weights"]
    return [Path(folder) for folder in named if folder]


def hub_cache() -> Path:
    """Return the folder in which huggingface_hub keeps downloads, by its documented environment variables."""
    if own := os.environ.get("HF_HUB_CACHE"):
        return Path(own).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", str(Path(parent) / "huggingface"))
    return Path(home).expanduser() / "hub"


def _candidates(
    files: Sequence[str], weights_dir: str | Path | None, hub: str, hub_files: Sequence[str]
) -> Iterator[Path]:
    for folder in weights_folders(weights_dir):
        yield from (folder / file for file in files)
    if hub:
        snapshots = hub_cache() / f"models--{hub.replace('/', '--')}" / "snapshots"
        for file in hub_files:
            yield from sorted(snapshots.glob(f"*/{file}"), key=lambda path: path.lstat().st_mtime, reverse=True)


def find_weights(
    files: Sequence[str], weights_dir: str | Path | None = None, hub: str = "", hub_files: Sequence[str] = ()
) -> Path | None:
    """Return the first weight file that exists, or None.

    Args:
        files: accepted file names in the weights folders, best first.
        weights_dir: folder searched first.
        hub: Hugging Face repository whose cached downloads are searched last, newest first.
        hub_files: accepted file names in that repository.
    """
    return next((path for path in _candidates(files, weights_dir, hub, hub_files) if path.is_file()), None)
