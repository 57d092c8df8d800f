"""Which distillation losses a run has: those asked for that some teacher can serve."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from amkd_monai.distillation.contrastive import SampleTable
from amkd_monai.distillation.interface import TeacherSpec

logger = logging.getLogger("amkd_monai")

LOSSES = ("output", "feature", "reconstruction", "contrastive")
DEFAULT_LOSSES = {"output": 1.0, "feature": 0.2}


def choose_losses(
    asked: Mapping[str, float] | None, teachers: Sequence[TeacherSpec], samples: SampleTable | None, return_code: str
) -> dict[str, float]:
    """Return the priors of the losses that the teachers can serve; 0 for the others, nothing without teachers.

    Args:
        asked: {loss: relative importance}; None takes the defaults.
        teachers: what each teacher offers.
        samples: table of the training dataset, for the contrastive loss.
        return_code: ``none``, or the code that the reconstruction needs.

    Raises:
        ValueError: an unknown loss, one whose other setting is missing, or no loss is left.
    """
    priors = dict(DEFAULT_LOSSES if asked is None else asked)
    if unknown := set(priors) - set(LOSSES):
        raise ValueError(f"Unknown losses {sorted(unknown)}: use some of {', '.join(LOSSES)}.")
    if not teachers:
        return {}
    if priors.get("reconstruction") and return_code == "none":
        raise ValueError("The loss 'reconstruction' needs a code: set return_code to 'learned' or 'pca'.")
    if priors.get("contrastive") and samples is None:
        raise ValueError("The loss 'contrastive' needs a table of the training samples: give `samples`.")
    features = any(t.grid is not None for t in teachers)
    offered = {
        "output": any(t.admitted and t.logits is not None for t in teachers),
        "feature": features,
        "reconstruction": features,
        "contrastive": samples is not None and bool(samples.vectors),
    }
    chosen = {name: prior if offered[name] else 0.0 for name, prior in priors.items()}
    if not any(chosen.values()):
        raise ValueError(
            "No teacher offers what the losses ask for (features or admitted answers): change `losses`, the "
            "teachers, or use none."
        )
    for name in chosen:
        if priors[name] and not offered[name]:
            logger.warning("No teacher offers what the loss '%s' asks for: it takes no part in this run.", name)
    return chosen
