"""The image encoder: timm's FocalNet, loadable and savable under the names of the official checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from timm.models.focalnet import FocalNet
from torch import Tensor, nn

LEVELS = 4
LINEAR = re.compile(r"\.(modulation\.f|modulation\.proj|mlp\.fc1|mlp\.fc2)\.weight$")
"""Linear layers of the official network that timm computes as 1x1 convolutions."""


class FocalBackbone(nn.Module):
    """FocalNet (Yang et al., Focal Modulation Networks, NeurIPS 2022) with a LayerNorm on each stage's map.

    ``state_dict`` and ``load_state_dict`` speak the official names and shapes.

    Args:
        width: channels of the first stage; each further stage has twice as many.
        depths: blocks per stage.
    """

    def __init__(self, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        network = FocalNet(
            num_classes=0,
            embed_dim=width,
            depths=tuple(depths),
            focal_levels=(4,) * LEVELS,
            use_overlap_down=True,
            use_post_norm=True,
            normalize_modulator=True,
            layerscale_value=1e-4,
            drop_path_rate=0.0,
        )
        self.patch_embed, self.layers = network.stem, network.layers
        for level in range(LEVELS):
            self.add_module(f"norm{level}", nn.LayerNorm(width * 2**level))
        self.register_state_dict_post_hook(_to_official)
        self.register_load_state_dict_pre_hook(_from_official)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps (B, C, H/4, W/4) to (B, 8 C, H/32, W/32) of pixels (B, 3, H, W); H, W multiples of 32."""
        maps, x = [], self.patch_embed(pixels)
        for level, layer in enumerate(self.layers):
            x = layer(x)
            normalised = self.get_submodule(f"norm{level}")(x.permute(0, 2, 3, 1))
            maps.append(normalised.permute(0, 3, 1, 2).contiguous())  # (B, h, w, C) -> (B, C, h, w)
        return maps


def official_name(name: str) -> str:
    """Return what the official checkpoint calls a parameter of :class:`FocalBackbone`."""
    name = re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    return re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", re.sub(r"\.norm([12])_post\.", r".norm\1.", name))


def _to_official(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {name: state.pop(prefix + name) for name, _ in module.named_parameters()}
    for name, value in own.items():
        state[prefix + official_name(name)] = value.flatten(1) if LINEAR.search(name) else value


def _from_official(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {name: state.pop(prefix + official_name(name), None) for name, _ in module.named_parameters()}
    for name, value in own.items():
        if value is not None:
            state[prefix + name] = value[..., None, None] if LINEAR.search(name) else value
