"""A student that is no class of the package, as far as a config can tell."""

from __future__ import annotations

from amkd_monai.networks import Student


def own_student(num_classes: int, neck_channels: int) -> Student:
    """Return a student without pretrained weights."""
    return Student(num_classes=num_classes, neck_channels=neck_channels, weights="random")
