"""The pixel decoder: a transformer on the coarsest map, then a feature pyramid down to stride 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.teachers.biomedparse.blocks import EncoderLayer, sine_positions

GROUPS = 32


@dataclass
class PixelFeatures:
    """What the mask decoder reads of an image.

    Attributes:
        encoded: output of the transformer (B, C, H/32, W/32).
        scales: three maps (B, C, h, w) of the strides 32, 16, 8.
        mask_features: (B, C, H/4, W/4).
    """

    encoded: Tensor
    scales: list[Tensor]
    mask_features: Tensor

    def float(self) -> PixelFeatures:
        """Return the same in float32."""
        return PixelFeatures(self.encoded.float(), [scale.float() for scale in self.scales], self.mask_features.float())


class NormedConv(nn.Conv2d):
    """A convolution without bias, group-normalised."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, h, w) of (B, inputs, h, w)."""
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """Maps of the backbone to maps of one width (Zou et al., Generalized Decoding for Pixel, Image, and Language).

    Args:
        channels: channels of the backbone's four maps, strides 4 to 32.
        width: channels of all outputs.
        heads: attention heads.
        hidden: hidden channels of the feed-forward layers.
        layers: transformer layers.
    """

    def __init__(self, channels: Sequence[int], width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.input_proj = nn.Conv2d(channels[-1], width, 1)
        encoder = nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(layers))})
        self.transformer = nn.ModuleDict({"encoder": encoder})
        self.adapter_1, self.adapter_2, self.adapter_3 = (NormedConv(c, width, 1) for c in channels[:3])
        self.layer_1, self.layer_2, self.layer_3, self.layer_4 = (NormedConv(width, width, 3) for _ in range(4))
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> PixelFeatures:
        """Decode the backbone's maps (B, C_i, h_i, w_i), finest first."""
        x = self.input_proj(maps[-1])
        tokens, places = x.flatten(2).transpose(1, 2), sine_positions(x, x.shape[1])  # (B, C, h, w) -> (B, h * w, C)
        for layer in self.transformer["encoder"]["layers"]:
            tokens = layer(tokens, places)
        encoded = tokens.transpose(1, 2).reshape(x.shape)
        scales = [F.relu(self.layer_4(encoded))]
        finer = ((self.adapter_3, self.layer_3), (self.adapter_2, self.layer_2), (self.adapter_1, self.layer_1))
        for grid, (adapter, layer) in zip(maps[-2::-1], finer, strict=True):
            lateral = adapter(grid)
            above = F.interpolate(scales[-1], size=lateral.shape[-2:], mode="nearest")
            scales.append(F.relu(layer(lateral + above)))
        return PixelFeatures(encoded, scales[:3], self.mask_features(scales[-1]))
