"""Official weights into the network: every key is used, or named here as one that answering does not need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from amkd_monai.weights import load_strict

PREDICTOR = "sem_seg_head.predictor."
UNUSED = (
    f"{PREDICTOR}lang_encoder.biomed_encoder.",  # a BiomedBERT that was tried and left out of the forward path
    f"{PREDICTOR}mask_sptial_embed.",  # prompts by strokes, here and in the next three
    f"{PREDICTOR}pn_indicator.",
    f"{PREDICTOR}spatial_embed.",
    f"{PREDICTOR}spatial_featured.",
    "dilation_kernel",  # training only, here and in the next
    "criterion.empty_weight",
)
"""Prefixes of the official checkpoint's keys that a text-prompted mask does not depend on."""


def load_official(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a network from a state dict in the layout of ``biomedparse_v1.pt``; ``source`` is named in errors.

    Raises:
        CheckpointError: a key is missing, surplus, or has another shape.
    """
    load_strict(network, state, source, allow_unexpected=UNUSED)
