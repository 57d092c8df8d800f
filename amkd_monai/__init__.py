"""Adaptive multi-teacher knowledge distillation for medical imaging on MONAI."""

__version__ = "0.1.0"
