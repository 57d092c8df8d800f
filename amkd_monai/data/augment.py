"""Batch augmentation on tensors: parameters are sampled first and applied later, so that they can be replayed.

One affine matrix per sample warps image, label and cached teacher maps alike. Warping is exact for labels and logits;
for feature maps it depends on the change (:meth:`Augmentation.check_features`). An un-warped map would be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VALIDITIES = ("exact", "approximate", "invalid")  # what warping makes of a cached feature map
LARGEST_APPROXIMATE = {"rotation": 0.6, "scale": 0.5, "shift": 0.5, "flip_height": 1.0, "flip_width": 1.0}
"""Largest geometric changes of which warped feature maps are an approximation.

Cosine of a warped map with the map of the warped image, ImageNet EfficientNet-Lite0, stride 16: shift by a cell 0.998,
zoom 1.2 0.84, horizontal flip 0.82, rotation by 10 degrees 0.86, by 25 degrees 0.77, by 90 degrees 0.52.
"""


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes.

    Attributes:
        rotation: largest angle, radians.
        scale: largest relative zoom, e.g. 0.15 for 1/1.15 to 1.15.
        shift: largest shift as a part of the side.
        flip_height, flip_width: whether to mirror that axis with probability 1/2.
        gain: largest relative change of intensity per image.
        offset: largest added intensity, in [0, 1] units.
        colour: largest relative gain change per channel.
        gamma: largest relative change of the exponent, e.g. 0.4 for x^(1/1.4) to x^1.4.
        together: samples, one after another, that are changed alike: the slices of a patch.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    flip_height: bool = False
    flip_width: bool = False
    gain: float = 0.0
    offset: float = 0.0
    colour: float = 0.0
    gamma: float = 0.0
    together: int = 1

    def check_features(self, accepted: str) -> None:
        """Refuse geometric changes that make warped cached feature maps worse than ``accepted``, of ``VALIDITIES``.

        Raises:
            ValueError: a change is worse, or ``accepted`` is no validity.
        """
        if accepted not in VALIDITIES:
            raise ValueError(f"`warped_features` is '{accepted}': use one of {', '.join(VALIDITIES)}.")
        for name, largest in LARGEST_APPROXIMATE.items():
            value = getattr(self, name)
            validity = "exact" if value == 0 else "approximate" if value <= largest else "invalid"
            if VALIDITIES.index(validity) > VALIDITIES.index(accepted):
                remedy = f"lower it, store `views` instead, or accept it by `warped_features`: '{validity}'"
                raise ValueError(f"The {name} of {value} makes cached teacher features {validity}: {remedy}.")

    def sample(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw affine matrices (B, 2, 3) in the normalised coordinates of ``affine_grid`` for maps of (H, W)."""
        count = batch // self.together

        def uniform(limit: float) -> Tensor:
            return (torch.rand(count, generator=generator) * 2 - 1) * limit

        def sign(wanted: bool) -> Tensor:
            return 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float() * float(wanted)

        angle, zoom = uniform(self.rotation), torch.exp(uniform(math.log1p(self.scale)))
        shift_x, shift_y = uniform(2 * self.shift), uniform(2 * self.shift)
        flip_x, flip_y = sign(self.flip_width), sign(self.flip_height)
        height, width = size
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        rows = [
            torch.stack([cos * flip_x, -sin * flip_y * height / width, shift_x], dim=1),
            torch.stack([sin * flip_x * width / height, cos * flip_y, shift_y], dim=1),
        ]
        return torch.stack(rows, dim=1).repeat_interleave(self.together, 0)

    def photometric(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Change gamma, gain, offset and colour of an image (B, C, H, W) in [0, 1]; a teacher never sees this."""
        draw = torch.rand((len(image) // self.together, 6), generator=generator).to(image.device) * 2 - 1
        draw = draw.repeat_interleave(self.together, 0)
        channels = image.shape[1]
        colours = draw[:, 1:4].repeat(1, -(-channels // 3))[:, :channels]
        gain = 1 + self.gain * draw[:, 0, None] + self.colour * colours  # (B, C)
        gamma = torch.exp(draw[:, 5] * math.log1p(self.gamma))
        image = image.clamp_min(0) ** gamma[:, None, None, None]
        return (image * gain[:, :, None, None] + self.offset * draw[:, 4, None, None, None]).clamp(0, 1)


def warp(maps: Tensor, theta: Tensor, mode: str = "bilinear") -> Tensor:
    """Warp maps (B, C, h, w) of any size by the affine matrices (B, 2, 3) of :meth:`Augmentation.sample`.

    Beyond the border the image is mirrored, alike at every resolution. Cells of a map of width 1 describe the whole
    image and pass through.
    """
    if maps.shape[-1] == 1:
        return maps
    grid = F.affine_grid(theta.to(maps), list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode=mode, padding_mode="reflection", align_corners=False)
