"""MedSAM: SAM's ViT-B fine-tuned on medical images, prompted with a box.

Ma et al., Segment anything in medical images, Nature Communications 2024.
"""

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.transform import resize
from torch import Tensor, nn

from amkd_monai.teachers.base import TeacherFeatures, binary_to_two_class, fixed_initialisation, pool_to_grid
from amkd_monai.teachers.official import OfficialTeacher, each_image, read_official
from amkd_monai.weights import CheckpointError

logger = logging.getLogger("amkd_monai")

PROMPTS = ("none", "whole_image", "label_box")
PATCH = 16
VIT_B = {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11), "out_chans": 256}
NO_OBJECT = -10.0  # foreground logit where the label is empty: there is no box to prompt with, and no object

GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_TIED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
"""One tensor under two names; a file in Hugging Face's layout may hold either or both."""

_LAYERS = ("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3")
_MLP = r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))"
_RENAMES = (
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^(image_encoder\.patch_embed)\.projection\.", r"\1.proj."),
    *((rf"^(image_encoder\.neck)\.{name}\.", rf"\1.{n}.") for n, name in enumerate(_LAYERS[:4])),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    *(
        (rf"^prompt_encoder\.mask_embed\.{name}\.", f"prompt_encoder.mask_downscaling.{n}.")
        for n, name in zip((0, 1, 3, 4, 6), _LAYERS, strict=True)
    ),
    *(
        (rf"^mask_decoder\.{name}\.", f"mask_decoder.output_upscaling.{n}.")
        for n, name in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2"))
    ),
    (_MLP + r"\.layers\.0\.", r"\1.layers.1."),
    (_MLP + r"\.proj_in\.", r"\1.layers.0."),
    (_MLP + r"\.proj_out\.", r"\1.layers.2."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)
"""Hugging Face's names of SAM's tensors (``transformers.SamModel``) and segment-anything's, applied in this order."""


class MedSAMTeacher(OfficialTeacher):
    """MedSAM's image embedding as the grid and, if a prompt policy is set, its mask as logits.

    Args:
        weights: ``medsam_vit_b.pth`` or Hugging Face's layout of it.
        prompt: ``none`` gives features alone; ``whole_image`` prompts with a box around the image; ``label_box`` with
            the box of the label's foreground (the whole image where there is no label), so that its answers know the
            label and admission by score does not say how well it would do without.
        image_size: official files know 1024 alone.
        grid_limit: 64 keeps the whole embedding.
        sizes: options of the image encoder other than :data:`VIT_B`, for tests; ``out_chans`` a multiple of 16.
        precision: of the image encoder.
    """

    resize = "scikit-image bicubic spline, anti-aliased, squashed, 8 bit"
    normalisation = "minimum to maximum of the image"
    settings = (*OfficialTeacher.settings, "prompt")

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        prompt: str = "none",
        image_size: int = 1024,
        grid_limit: int = 16,
        sizes: Mapping[str, Any] | None = None,
        precision: str = "float32",
        licence: str = "Apache-2.0",
    ) -> None:
        super().__init__(name, licence, precision)
        try:
            from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
        except ImportError as error:
            raise ValueError("MedSAM needs segment-anything: run `pip install segment-anything`.") from error
        self.prompt, self.image_size, self.grid_limit = self.one_of("prompt", prompt, PROMPTS), image_size, grid_limit
        self.uses_labels = prompt == "label_box"
        side = self.patches(PATCH)
        official = read_official("medsam", weights)
        if "vision_encoder.pos_embed" in official.state:
            official.state = from_hugging_face(official.state, official.path)
        if (key := "image_encoder.pos_embed") in official.state:
            trained = official.shape(key, 4, "(1, n, n, channels)")[1]
            if trained != side:
                sizes_differ = f"images resized to {trained * PATCH} pixels, not {image_size}"
                raise CheckpointError(f"{official.path} is for {sizes_differ}: set `image_size` to it.")
        sizes = {**VIT_B, **(sizes or {})}
        channels, norm = sizes["out_chans"], partial(nn.LayerNorm, eps=1e-6)
        with fixed_initialisation(replaced=bool(official.state)):
            encoder = ImageEncoderViT(image_size, PATCH, norm_layer=norm, use_rel_pos=True, window_size=14, **sizes)
            prompts = PromptEncoder(channels, (side, side), (image_size, image_size), mask_in_chans=16)
            transformer = TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=2048, num_heads=8)
            decoder = MaskDecoder(transformer_dim=channels, transformer=transformer)
        self.network = nn.ModuleDict({"image_encoder": encoder, "prompt_encoder": prompts, "mask_decoder": decoder})
        self.fill(official)

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input (B, 3, S, S) in [0, 1] for images (B, 3, H, W), RGB in [0, 1]."""
        size = (self.image_size, self.image_size)

        def squashed(pixels: np.ndarray) -> np.ndarray:
            resized = resize(pixels, size, order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
            low, high = int(resized.min()), int(resized.max())
            return (resized - low) / max(high - low, 1e-8)

        return each_image(image, squashed)

    def boxes(self, image: Tensor, label: Tensor | None) -> Tensor:
        """Return one box (B, 4) per image, x and y of two corners in the network's pixels; NaN where none fits.

        A ValueError if boxes of labels are wanted without a label.
        """
        whole = torch.tensor([0, 0, self.image_size, self.image_size], dtype=torch.float32, device=image.device)
        boxes = whole.repeat(len(image), 1)
        if self.prompt != "label_box" or image.is_meta:
            return boxes
        if label is None:
            raise ValueError(f"The teacher '{self.name}' prompts with boxes of labels: call it with the label.")
        height, width = label.shape[-2:]  # the image may show the same frame in more pixels
        scale = whole[2:].repeat(2) / torch.tensor([width, height, width, height], device=image.device)
        for box, mask in zip(boxes, label[:, 0], strict=True):
            rows, columns = torch.nonzero((mask > 0) & (mask != 255), as_tuple=True)
            if len(rows):
                box[:] = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()]) * scale
            elif not bool((mask == 255).all()):  # labelled, without an object
                box[:] = torch.nan
        return boxes

    def answer(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask logits (B, 1, 4h, 4w) and predicted overlap (B, 1) for embeddings (B, C, h, w), one box each."""
        encoder, decoder = self.network["prompt_encoder"], self.network["mask_decoder"]
        masks, overlaps = [], []
        for one, box in zip(embedding.split(1), boxes, strict=True):  # the decoder takes prompts of one image
            sparse, dense = encoder(points=None, boxes=box.view(1, 1, 4), masks=None)
            mask, overlap = decoder(one, encoder.get_dense_pe(), sparse, dense, multimask_output=False)
            masks.append(mask)
            overlaps.append(overlap)
        return torch.cat(masks), torch.cat(overlaps)

    def forward(self, image: Tensor, label: Tensor | None = None) -> TeacherFeatures:
        """Return grid (B, C, h, w), pooled (B, C) and, with a prompt, two-class logits (B, 2, S/4, S/4).

        Only ``label_box`` reads the label: class indices (B, 1, h, w) of the same frame, 255 where unlabelled.
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


def from_hugging_face(state: Mapping[str, Tensor], source: Path | None) -> dict[str, Tensor]:
    """Rename a state dict of ``transformers.SamModel`` to segment-anything's names; ``source`` stands in a warning."""
    renamed = {}
    for key, value in state.items():
        if key not in _TIED:
            for pattern, replacement in _RENAMES:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value
    copies = [state[key] for key in _TIED if key in state]
    if copies:
        renamed[GAUSSIAN] = copies[0]
    if len(copies) == 2 and not torch.equal(*copies):
        logger.warning("%s holds two different position matrices; %s is used.", source, _TIED[0])
    return renamed
