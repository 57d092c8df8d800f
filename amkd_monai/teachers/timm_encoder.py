"""Encoders as teachers of features: any timm network, and the encoder of a student of this project."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from amkd_monai.networks.shared_student import heads_of, state_of_task
from amkd_monai.networks.student import EncodedStudent, create_encoder, feature_encoder, load_encoder_weights
from amkd_monai.teachers.base import Teacher, TeacherFeatures, pool_to_grid, resize
from amkd_monai.weights import PACKAGED, load_state_dict, load_strict, packaged_file


class TimmTeacher(Teacher):
    """A frozen timm encoder: the feature map of one stage and the pooled vector before the classifier.

    Args:
        model: timm name, for example ``tf_efficientnet_lite2`` or ``vit_base_patch16_224``.
        weights: ``packaged``, a checkpoint file with timm's keys, or ``random`` (marks the run as a test).
        image_size: None takes the network's fixed size if it has one, else the images as they come.
        stride: stride of the feature map wanted (the nearest stage at or below it is taken).
    """

    resize = "bilinear, anti-aliased, squashed"
    settings = ("model", "image_size", "resize", "mean", "std", "stage", "grid_limit")

    def __init__(
        self,
        name: str,
        model: str,
        weights: str | Path = "packaged",
        image_size: int | None = None,
        stride: int = 16,
        grid_limit: int = 16,
        licence: str | None = None,
    ) -> None:
        super().__init__(name, licence or (PACKAGED[model].licence if model in PACKAGED else "unknown"))
        self.network = create_encoder(model, num_classes=0)
        load_encoder_weights(self.network, model, weights)
        config = self.network.pretrained_cfg
        if image_size is None and config.get("fixed_input_size"):
            image_size = int(config["input_size"][-1])
        self.model, self.image_size, self.grid_limit = model, image_size, grid_limit
        reductions = [stage["reduction"] for stage in self.network.feature_info]
        self.stage = max((i for i, r in enumerate(reductions) if r <= stride), default=0)
        self.is_random = str(weights) == "random"
        if not self.is_random:
            self.came_from(packaged_file(model) if str(weights) == "packaged" else weights)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.freeze()

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return the grid (B, C, h, w) and the pooled vector (B, C') of an image (B, 3, H, W), RGB in [0, 1]."""
        normalised = (resize(image, self.image_size) - self.mean) / self.std
        final, maps = self.network.forward_intermediates(normalised, indices=[self.stage], output_fmt="NCHW")
        pooled = self.network.forward_head(final, pre_logits=True)
        return TeacherFeatures(grid=pool_to_grid(maps[0], self.grid_limit), pooled=pooled)


class StudentTeacher(Teacher):
    """The encoder of a student of this project, shared or of one task; it gives features, no answers of its own.

    Args:
        weights: flat state dict, e.g. ``bundles/multitask/models/model.pt``.
        model: timm name of its encoder.
        task: whose batch norms are taken where a shared student has them per data set; None takes the first task's.
        image_size: None takes images as they come.
        licence: of the weights; it follows from the data and teachers that the student was trained with.
    """

    settings = ("model", "image_size", "grid_limit")

    def __init__(
        self,
        name: str,
        weights: str | Path,
        model: str = "tf_efficientnet_lite0",
        task: str | None = None,
        image_size: int | None = None,
        grid_limit: int = 16,
        licence: str = "unknown",
    ) -> None:
        super().__init__(name, licence)
        state = load_state_dict(weights)
        if heads := heads_of(state):
            state = state_of_task(state, task or next(iter(heads)))
        self.network = EncodedStudent(feature_encoder(model, range(1, 5), 0.0))
        load_strict(self.network, state, weights, allow_unexpected=("neck.", "head.", "temperature"))
        self.came_from(weights)
        self.model, self.image_size, self.grid_limit = model, image_size, grid_limit
        self.freeze()

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return the map at stride 16 (B, C, h, w) and the pooled last map (B, C') of an image (B, 3, H, W)."""
        levels = self.network.features(resize(image, self.image_size))
        return TeacherFeatures(grid=pool_to_grid(levels[16], self.grid_limit), pooled=levels[32].mean((2, 3)))
