"""Where weight files lie: named folders, then the Hugging Face cache; how a download gets there. Imports no torch.

Only :func:`fetch` touches the network, when a person asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from amkd_monai.terminal import is_quiet


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


def fetch(repository: str, files: Sequence[str]) -> Path:
    """Download the first of ``files`` that a repository has into the Hugging Face cache, where teachers look.

    Args:
        repository: ``owner/name`` on huggingface.co.
        files: accepted file names, best first.

    Raises:
        OSError: no access, no network, no such file, or no space.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    if is_quiet():
        disable_progress_bars()
    page = f"https://huggingface.co/{repository}"
    for file in files:
        try:
            return Path(hf_hub_download(repository, file))
        except GatedRepoError as error:
            raise OSError(f"{page} asks for consent: accept its conditions there, then set HF_TOKEN.") from error
        except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:  # the latter without a network
            raise OSError(
                f"{page} cannot be reached or is closed to you: check the network, HF_HUB_OFFLINE and HF_TOKEN, or "
                f"copy {file} into weights/."
            ) from error
        except EntryNotFoundError:
            continue
    raise OSError(f"{page} has none of {', '.join(files)}: look there for the file's present name.")
