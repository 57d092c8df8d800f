"""Official weights into the network: every key is used, or named here as one that answering does not need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from amkd_monai.weights import CheckpointError, load_state_dict, load_strict

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

VERSION_2 = (f"{PREDICTOR}language_encoder.", "output_deconv.", "object_existence")
"""Parts of keys that only version 2 of the network has."""


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Fill a network from a file in the layout of ``biomedparse_v1.pt``.

    Raises:
        CheckpointError: the file is missing, damaged, of version 2, or does not fit.
    """
    load_official(network, load_state_dict(path), path)


def load_official(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a network from a state dict in the official layout; ``source`` is named in errors.

    Fine-tuned files of the authors' trainer prefix every key with ``model.``; the prefix is stripped.

    Raises:
        CheckpointError: the state dict is of version 2, or does not fit.
    """
    while state and all(key.startswith(("model.", "module.")) for key in state):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    if any(mark in key for key in state for mark in VERSION_2):
        raise CheckpointError(
            f"{source} holds BiomedParse v2, which is another network than v1: give biomedparse_v1.pt instead."
        )
    load_strict(network, state, source, allow_unexpected=UNUSED)
