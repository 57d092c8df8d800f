"""Download weights from the Hugging Face hub, only when a person asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amkd_monai.terminal import is_quiet


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
