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
        OSError: no access, no network, no such file, or no space; one sentence each.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
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
        except RepositoryNotFoundError as error:
            raise OSError(f"{page} is not there, or not for you: set HF_TOKEN, or get the file by hand.") from error
        except LocalEntryNotFoundError as error:  # a network fault or HF_HUB_OFFLINE; a subclass of the next
            raise OSError(
                f"{page} cannot be reached: check the network and HF_HUB_OFFLINE, or copy {file} into weights/."
            ) from error
        except EntryNotFoundError:
            continue
        except HfHubHTTPError as error:
            raise OSError(
                f"{page} did not deliver {file} ({type(error).__name__}): try again, or get the file by hand."
            ) from error
    raise OSError(f"{page} has none of {', '.join(files)}: look there for the file's present name.")
