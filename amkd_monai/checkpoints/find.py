"""Where weight files lie: named folders, then the Hugging Face cache. Imports no torch and touches no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def weights_folders(weights_dir: str | Path | None = None) -> list[Path]:
    """Return the folders searched for weight files: the argument, ``$AMKD_WEIGHTS``, ``weights/``."""
    named = [weights_dir, os.environ.get("AMKD_WEIGHTS"), "weights"]
    return [Path(folder) for folder in named if folder]


def find_weights(
    files: Sequence[str], weights_dir: str | Path | None = None, hub: str = "", hub_files: Sequence[str] = ()
) -> Path | None:
    """Return the first weight file that exists, or None.

    Args:
        files: accepted file names in the weights folders, best first.
        weights_dir: folder searched first.
        hub: Hugging Face repository whose cached download is searched last.
        hub_files: accepted file names in that repository.
    """
    for folder in weights_folders(weights_dir):
        if found := next((folder / file for file in files if (folder / file).is_file()), None):
            return found
    if hub:
        from huggingface_hub import try_to_load_from_cache

        cached = (try_to_load_from_cache(hub, file) for file in hub_files)
        return next((Path(path) for path in cached if isinstance(path, str)), None)
    return None
