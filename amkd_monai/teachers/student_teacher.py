"""A trained student as a teacher: what an earlier run learned is kept while another one learns more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from amkd_monai.networks.initial import heads_of, state_of_task
from amkd_monai.networks.student import EncodedStudent, feature_encoder
from amkd_monai.teachers.base import Teacher, TeacherFeatures, pool_to_grid, resize
from amkd_monai.weights import load_state_dict, load_strict


class StudentTeacher(Teacher):
    """The encoder of a student of this project, shared or of one task; it gives features, no answers of its own.

    Args:
        weights: flat state dict, e.g. ``bundles/multitask/models/model.pt``.
        model: timm name of its encoder.
        task: whose batch norms are taken where a shared student has them per data set; None takes the first task's.
        image_size: None takes images as they come.
        licence: licence of the weights; that of the data and teachers that the student was trained with.
    """

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

    def preprocessing(self) -> dict[str, Any]:
        """Return encoder, size and grid."""
        return {"model": self.model, "image_size": self.image_size, "grid_limit": self.grid_limit}

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return the map at stride 16 (B, C, h, w) and the pooled last map (B, C') of an image (B, 3, H, W)."""
        levels = self.network.features(resize(image, self.image_size))
        return TeacherFeatures(grid=pool_to_grid(levels[16], self.grid_limit), pooled=levels[32].mean((2, 3)))
