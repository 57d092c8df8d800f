"""RETFound: a ViT-L for retinal images, pretrained as a masked autoencoder or with DINOv2.

Zhou et al., A foundation model for generalizable disease detection from retinal images, Nature 2023.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from amkd_monai.teachers.base import TeacherFeatures, fixed_initialisation, pool_to_grid
from amkd_monai.teachers.official import OfficialTeacher, each_image, imagenet_normalised, pooled_patches, read_official
from amkd_monai.weights import CheckpointError

VARIANTS = ("mae_natureCFP", "mae_natureOCT", "mae_meh", "mae_shanghai", "dinov2_meh", "dinov2_shanghai")
"""Official files are called ``RETFound_<variant>.pth``."""

PRETRAINING_ONLY = ("decoder_", "mask_token", "dino_head.", "ibot_head.")
"""Prefixes of what an official file holds besides the encoder."""


class RETFoundTeacher(OfficialTeacher):
    """RETFound's encoder: raw patch tokens of the last block as the grid, their normed mean as the pooled vector.

    A DINOv2 file gives normed patch tokens and the normed class token instead. A fine-tuned file (with a head) also
    gives class logits (B, num_classes).

    Args:
        variant: which pretraining the file is of, one of :data:`VARIANTS`.
        image_size: position embeddings are resized to it as upstream does.
        framing: ``crop`` as the authors do (the grid then covers the centre of the image alone), or ``squash``, whose
            grid covers the whole image: what a mask task needs.
        fc_norm_applications: 2 repeats upstream's double normalisation before the head, for files fine-tuned with it.
        sizes: ``embed_dim``, ``depth`` and ``num_heads`` other than the official ones, for tests.
    """

    settings = (*OfficialTeacher.settings, "variant", "fc_norm_applications")

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        variant: str = "mae_natureCFP",
        image_size: int = 224,
        framing: str = "crop",
        fc_norm_applications: int = 1,
        grid_limit: int = 16,
        sizes: Mapping[str, int] | None = None,
        precision: str = "float32",
        licence: str = "CC BY-NC 4.0",
    ) -> None:
        super().__init__(name, licence, precision)
        self.variant, self.is_dino = self.one_of("variant", variant, VARIANTS), variant.startswith("dinov2")
        self.image_size, self.grid_limit = image_size, grid_limit
        self.framing = self.one_of("framing", framing, ("crop", "squash"))
        self.fc_norm_applications = self.one_of("fc_norm_applications", fc_norm_applications, (1, 2))
        self.resize, side = f"Pillow bicubic, {framing}", self.patches(14 if self.is_dino else 16)
        official = read_official(f"retfound_{variant}", weights)
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", official.path.name if official.path else "")
        if (other := "cfp" if "OCT" in variant else "oct") in map(str.lower, words):  # the layouts are the same
            modality = {"cfp": "fundus photographs", "oct": "OCT"}[other]
            raise CheckpointError(f"{official.path} is for {modality} by its name, not for '{variant}': change one.")
        official.state = state = {key.removeprefix("backbone."): value for key, value in official.state.items()}
        classes = official.shape("head.weight", 2, "(classes, channels)")[0] if "head.weight" in state else 0
        with fixed_initialisation(replaced=bool(official.state)):
            self.network: nn.Module = timm.create_model(
                "vit_large_patch14_dinov2" if self.is_dino else "vit_large_patch16_224",
                img_size=image_size,
                num_classes=classes,
                global_pool="avg" if "fc_norm.weight" in state else "token",
                **(sizes or {}),
            )
        if "pos_embed" in state:
            layout = "(1, 1 + n * n, channels) positions of n x n patches"
            batch, tokens, _ = official.shape("pos_embed", 3, layout)
            if batch != 1 or round((tokens - 1) ** 0.5) ** 2 != tokens - 1 or tokens < 2:
                raise official.misshapen("pos_embed", layout)
            # as upstream: without timm's anti-aliasing
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [side, side], antialias=False)
        self.fill(official, PRETRAINING_ONLY)

    @property
    def side(self) -> int:
        """Pixels of the shorter side of images, of which ``crop`` shows the network a part."""
        cropped = self.framing == "crop" and self.image_size <= 224
        return int(self.image_size / (224 / 256)) if cropped else self.image_size

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input (B, 3, S, S) for images (B, 3, H, W), RGB in [0, 1]."""
        if self.framing == "squash":
            return super().prepare(image)

        def cropped(pixels: np.ndarray) -> np.ndarray:
            resized = TF.resize(Image.fromarray(pixels), [self.side], InterpolationMode.BICUBIC)
            return np.asarray(TF.center_crop(resized, [self.image_size]))

        return imagenet_normalised(each_image(image, cropped))

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return grid (B, C, h, w), pooled (B, C) and, for a fine-tuned file, logits (B, classes)."""
        network, pixels = self.network, self.prepare(image)
        with self.autocast(image):
            ((grid, prefix),) = network.forward_intermediates(
                pixels, indices=1, norm=self.is_dino, return_prefix_tokens=True, intermediates_only=True
            )
        grid, logits = grid.float(), None
        if self.is_dino:
            pooled = prefix[:, 0].float()
        elif isinstance(network.fc_norm, nn.Identity):
            pooled = pooled_patches(grid)
        else:
            pooled = network.fc_norm(grid.mean((2, 3)))
        if network.num_classes:
            twice = self.fc_norm_applications == 2
            logits = network.head(network.fc_norm(pooled) if twice else pooled)
        return TeacherFeatures(grid=pool_to_grid(grid, self.grid_limit), pooled=pooled, logits=logits)
