"""Views: fixed geometric variants of every image that a teacher runs on, replayed exactly for the student.

A view is one affine matrix per sample, drawn from the sample's name and content alone: every teacher sees the same
views of an image whatever list it stands in. The matrices are stored next to the features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

MATRIX = "view"
"""Name of the stored array with the matrices (2, 3) of a store of several views."""

SMALLEST_CROP = 0.7
"""Smallest side of a random crop, as a part of the image's side."""
LARGEST_ROTATION = 0.26
"""Largest rotation of a random crop, radians: 15 degrees."""


def view_set(views: int) -> list[dict[str, Any]]:
    """Describe the first ``views`` views: identity, horizontal flip, then random resized crops with mild rotation."""
    if views < 1:
        raise ValueError(f"`views` is {views}: give the number of stored views of every image, 1 or more.")
    crop: dict[str, Any] = {"view": "crop", "smallest": SMALLEST_CROP, "rotation": LARGEST_ROTATION}
    crops = [{**crop, "number": number} for number in range(2, views)]
    return [*({"view": name} for name in ("identity", "horizontal_flip")), *crops][:views]


def view_matrix(parameters: Mapping[str, Any], sample_id: str, content_hash: str, size: tuple[int, int]) -> np.ndarray:
    """Affine matrix (2, 3) float32 of one view of a sample, in the normalised coordinates of ``affine_grid``.

    ``parameters`` are one entry of :func:`view_set`, ``size`` is (H, W) of the image.
    """
    side, angle, flip, shift = 1.0, 0.0, parameters["view"] == "horizontal_flip", np.zeros(2)
    if parameters["view"] == "crop":
        name = json.dumps([dict(parameters), sample_id, content_hash], sort_keys=True)
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        side, angle = rng.uniform(parameters["smallest"], 1), rng.uniform(-1, 1) * parameters["rotation"]
        flip, shift = rng.random() < 0.5, rng.uniform(side - 1, 1 - side, size=2)
    (height, width), mirror = size, -1.0 if flip else 1.0
    cos, sin = side * np.cos(angle), side * np.sin(angle)
    rows = [[cos * mirror, -sin * height / width, shift[0]], [sin * mirror * width / height, cos, shift[1]]]
    return np.asarray(rows, np.float32)
