"""Rewrite a checkpoint as safetensors: tensors and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from amkd_monai.atomic import atomic_path
from amkd_monai.weights import file_sha256, load_state_dict


def convert(source: str | Path, target: str | Path) -> str:
    """Write the tensors of a checkpoint to a ``.safetensors`` file, whole or not at all; return a summary.

    Containers and common prefixes are unwrapped as :func:`amkd_monai.weights.load_state_dict` does it; names are kept.

    Raises:
        ValueError: the target has another suffix, or is the source.
        CheckpointError: the source cannot be read safely.
        OSError: the target cannot be written; nothing half-written is left.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} does not end in .safetensors: name the output with that suffix.")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the file to convert: name another output.")
    state = {name: value.contiguous().clone() for name, value in load_state_dict(source).items()}
    with atomic_path(target) as temporary:
        try:
            save_file(state, temporary)
        except SafetensorError as error:  # its message is all that is left of the operating system's error
            code = re.search(r"code: (\d+)", str(error))
            raise OSError(int(code[1]) if code else None, str(error), str(temporary)) from error
    elements = sum(value.numel() for value in state.values())
    return f"{target}: {len(state)} tensors, {elements:,} elements, SHA-256 {file_sha256(target)}"
