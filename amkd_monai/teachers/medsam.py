"""MedSAM: SAM's ViT-B fine-tuned on medical images, prompted with a box.

Ma et al., Segment anything in medical images, Nature Communications 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.transform import resize
from torch import Tensor

from amkd_monai.checkpoints.signatures import MEDSAM, MEDSAM_HUB
from amkd_monai.teachers.base import Teacher, TeacherFeatures, binary_to_two_class, pool_to_grid
from amkd_monai.teachers.images import each_image
from amkd_monai.teachers.medsam_keys import from_hugging_face
from amkd_monai.teachers.medsam_network import PATCH, build_sam
from amkd_monai.teachers.official import OfficialWeights, fixed_initialisation, read_official
from amkd_monai.teachers.vit import patches_per_side
from amkd_monai.weights import CheckpointError, load_strict

PROMPTS = ("none", "whole_image", "label_box")
NO_OBJECT = -10.0
"""Foreground logit where the label is empty: there is no box to ask with, and no object."""


class MedSAMTeacher(Teacher):
    """MedSAM's image embedding as the grid and, if a prompt policy is set, its mask as logits.

    Args:
        name: name of the teacher in a run.
        weights: ``medsam_vit_b.pth`` or Hugging Face's layout of it, a folder with it, None to search for it, or
            ``random`` (marks the run as a test).
        prompt: ``none`` gives features alone; ``whole_image`` asks with a box around the image; ``label_box`` asks
            with the box of the label's foreground (the whole image where there is no label), so that its answers know
            the label and admission by score does not say how well it would do without.
        image_size: side of the network's input; 1024 is the only one that official files know.
        grid_limit: the embedding is area-pooled down to at most this many cells a side (64 keeps all of it).
        embed_dim: width of the image encoder; smaller ones are for tests.
        depth: number of its blocks.
        num_heads: its attention heads.
        global_blocks: its blocks that attend to the whole image.
        prompt_dim: channels of the embedding, a multiple of 16.
        precision: ``float32`` or ``bfloat16`` (autocast of the image encoder).
        licence: licence of the weights.

    Raises:
        ValueError: an option that is not understood, or segment-anything is not installed.
        CheckpointError: weights that are missing or do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        prompt: str = "none",
        image_size: int = 1024,
        grid_limit: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        global_blocks: tuple[int, ...] = (2, 5, 8, 11),
        prompt_dim: int = 256,
        precision: str = "float32",
        licence: str = "Apache-2.0",
    ) -> None:
        super().__init__(name, licence, precision)
        if prompt not in PROMPTS:
            raise ValueError(f"The teacher '{name}' has the prompt '{prompt}': use one of {', '.join(PROMPTS)}.")
        self.prompt, self.image_size, self.grid_limit = prompt, image_size, grid_limit
        self.uses_labels = prompt == "label_box"
        side = patches_per_side(name, image_size, PATCH)
        official = read_official("medsam", weights, "MedSAM (medsam_vit_b.pth)", {MEDSAM, MEDSAM_HUB})
        self.is_random = official is None
        with fixed_initialisation():
            self.network = build_sam(image_size, embed_dim, depth, num_heads, tuple(global_blocks), prompt_dim)
        if official is not None:
            self._load(official, side)
        self.freeze()

    def _load(self, official: OfficialWeights, side: int) -> None:
        state, path = official.state, official.path
        if "vision_encoder.pos_embed" in state:
            state = from_hugging_face(state, path)
        key = "image_encoder.pos_embed"
        trained = OfficialWeights(state, path).shape(key, 4, "(1, n, n, channels)")[1] if key in state else side
        if trained != side:
            raise CheckpointError(
                f"{path} is for images of {trained * PATCH} pixels, not {self.image_size}: leave out `image_size`, "
                "images of any size are resized to it."
            )
        load_strict(self.network, state, path)
        self.came_from(path)

    def preprocessing(self) -> dict[str, Any]:
        """Return size, filter, scaling and prompt."""
        return {
            "image_size": self.image_size,
            "resize": "scikit-image bicubic spline, anti-aliased, squashed, 8 bit",
            "normalisation": "minimum to maximum of the image",
            "prompt": self.prompt,
            "grid_limit": self.grid_limit,
            "precision": self.precision,
        }

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input (B, 3, S, S) in [0, 1] for images (B, 3, H, W), RGB in [0, 1]."""
        size = (self.image_size, self.image_size)

        def squashed(pixels: np.ndarray) -> np.ndarray:
            resized = resize(pixels, size, order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
            low, high = int(resized.min()), int(resized.max())
            return (resized - low) / max(high - low, 1e-8)

        return each_image(image, squashed)

    def boxes(self, image: Tensor, label: Tensor | None) -> Tensor:
        """Return one box (B, 4) per image, x and y of two corners in the network's pixels; NaN where none fits."""
        height, width = image.shape[-2:]
        whole = torch.tensor([0, 0, self.image_size, self.image_size], dtype=torch.float32, device=image.device)
        boxes = whole.repeat(len(image), 1)
        if self.prompt != "label_box":
            return boxes
        if label is None:
            raise ValueError(f"The teacher '{self.name}' asks with boxes of labels: call it with the label.")
        scale = whole[2:].repeat(2) / torch.tensor([width, height, width, height], device=image.device)
        for i, mask in enumerate(label[:, 0]):
            if bool((mask == 255).all()):  # unlabelled
                continue
            rows, columns = torch.nonzero((mask > 0) & (mask != 255), as_tuple=True)
            if len(rows) == 0:
                boxes[i] = torch.nan
                continue
            boxes[i] = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()]) * scale
        return boxes

    def answer(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask logits (B, 1, 4h, 4w) and predicted overlap (B, 1) for embeddings (B, C, h, w), one box each."""
        encoder, decoder = self.network["prompt_encoder"], self.network["mask_decoder"]
        answers = []
        for one, box in zip(embedding.split(1), boxes, strict=True):  # the decoder takes prompts of one image
            sparse, dense = encoder(points=None, boxes=box.view(1, 1, 4), masks=None)
            answers.append(
                decoder(
                    image_embeddings=one,
                    image_pe=encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=False,
                )
            )
        return torch.cat([mask for mask, _ in answers]), torch.cat([overlap for _, overlap in answers])

    def forward(self, image: Tensor, label: Tensor | None = None) -> TeacherFeatures:
        """Return grid (B, C, h, w), pooled (B, C) and, with a prompt, two-class logits (B, 2, S/4, S/4).

        Args:
            image: (B, 3, H, W), RGB in [0, 1].
            label: class indices (B, 1, H, W), 255 where unlabelled; only ``label_box`` reads it.
        """
        with self.autocast(image):  # one image at a time: global attention takes more than 2 GB at 1024 pixels
            parts = [self.network["image_encoder"](one) for one in self.prepare(image).split(1)]
        embedding, logits = torch.cat(parts).float(), None
        if self.prompt != "none":
            boxes = self.boxes(image, label)
            has_box = boxes.isfinite().all(1)
            mask, _ = self.answer(embedding, boxes.nan_to_num(0.0))
            logits = binary_to_two_class(torch.where(has_box.view(-1, 1, 1, 1), mask, NO_OBJECT))
        return TeacherFeatures(pool_to_grid(embedding, self.grid_limit), embedding.mean((2, 3)), logits)
