"""Recognises weight files by their first bytes and table of contents: without torch, and no tensor is read."""

import os
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

OTHER_KINDS = (
    (rb"\Z", "empty, or begins with zeros alone: obtain the file again"),
    (rb"PK", "cut off by an interrupted download: obtain the file again"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (rb"<[!?a-zA-Z]", "a web page (a download needed a login or confirmation): download it again"),
    (rb"[{\[]", "JSON text, not a checkpoint: give the file of weights"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "a compressed archive: unpack it"),
    (rb"\x89HDF", "an HDF5 file (Keras): give weights in PyTorch's or safetensors' format"),
    (rb"[\t\r\n -~]+\Z", "a text file, not a checkpoint: obtain the file again"),
)
"""How files begin that lie in place of a checkpoint, and what to say; the readers would say only that they cannot."""

OLD_PYTORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How PyTorch's files before release 1.6 begin: a number that its reader looks for, pickled."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, unsafe, or does not fit its network."""


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; what cannot be a path, being too long or holding a zero byte, is none."""
    return os.path.isfile(path)  # noqa: PTH113 - unlike pathlib's, it never raises


def kind_of_file(path: Path) -> str:
    """Return ``safetensors``, ``PyTorch``, or "" where only a reader could tell; no checkpoint, a CheckpointError."""
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            size = stream.seek(0, os.SEEK_END)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: change its permissions or those of its folder.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"There is no checkpoint at {path}: check the path or obtain the file first.") from error
    if head[4:9] == b"\0\0\0\0{":  # the length of its header in 8 bytes, then the header
        try:
            with safe_open(path, "numpy"):  # reads and checks the header alone
                return "safetensors"
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} ({size} bytes) is cut off or damaged: obtain the file again.") from error
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        return "PyTorch" if any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()) else ""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip(b"\xff\xfe").replace(b"\0", b"").lstrip()  # UTF-8, UTF-16
    for pattern, reason in OTHER_KINDS:
        if re.match(pattern, text) or re.match(pattern, head):
            raise CheckpointError(f"{path} ({size} bytes) is {reason}.")
    return "PyTorch" if head.startswith(OLD_PYTORCH) else ""
