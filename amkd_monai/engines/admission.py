"""Whether a teacher's answers are worth distilling: their scores, and the decision."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.distillation.losses import UNLABELLED, one_hot_area, soft_cross_entropy
from amkd_monai.metrics.classification import macro_auroc

MODES = ("cross_fit", "all", "none")

VOLUME_RATIO_TOLERANCE = 0.10
"""A volume teacher that draws more than 10 % too much or too little is not admitted."""


@dataclass(frozen=True)
class AnswerScore:
    """How good answers are on the labelled samples.

    Attributes:
        value: the score that decides, higher is better: for masks the mean Dice over cases (images or volumes) and
            foreground classes, cases without foreground left out; for classes of images the skill.
        cross_entropy: mean over grid cells or images, nats.
        further: ``volume_ratio`` (predicted by true foreground, over all cases) of masks, ``macro_auroc`` of classes.
        name: of the score, ``dice`` or ``skill``.
    """

    value: float
    cross_entropy: float
    further: dict[str, float] = field(default_factory=dict)
    name: str = "dice"

    def record(self) -> dict[str, float]:
        """All figures by name, rounded."""
        figures = {self.name: self.value, "cross_entropy": self.cross_entropy, **self.further}
        return {name: round(value, 4) for name, value in figures.items()}


@torch.inference_mode()
def score_answers(store: FeatureStore, dataset: DecodedDataset, temperature: float = 1.0) -> AnswerScore:
    """Score cached answers (``logits`` (N, classes, h, w)) against the labels.

    Masks are scored at the decoded size by Dice, classes of images by their skill 1 - CE / H (McFadden's pseudo R^2):
    0 for an answer that knows only the class frequencies, whose entropy is H, and 1 for the truth. That is the
    log-likelihood on a scale that does not depend on the data set. ``temperature`` divides the logits.
    """
    labelled = np.flatnonzero(dataset.has_label)
    if dataset.classes is not None:
        classes = dataset.classes[labelled]
        logits = torch.from_numpy(store.read("logits", labelled)).float()[:, :, 0, 0] / temperature
        cross_entropy = float(F.cross_entropy(logits, torch.from_numpy(classes)))
        skill = 1 - cross_entropy / max(prior_entropy(dataset), 1e-6)
        auroc = macro_auroc(classes, logits.softmax(1).numpy())
        return AnswerScore(skill, cross_entropy, {"macro_auroc": auroc}, "skill")
    overlap: dict[str, np.ndarray] = {}
    errors: list[float] = []
    for start in range(0, len(labelled), 32):
        rows = labelled[start : start + 32]
        logits = torch.from_numpy(store.read("logits", rows)).float() / temperature
        label = torch.from_numpy(np.stack([dataset.labels[i] for i in rows]))
        target = one_hot_area(label, dataset.num_classes, (logits.shape[-2], logits.shape[-1]))
        errors += soft_cross_entropy(target, logits.log_softmax(1)).flatten(1).mean(1).tolist()
        answer = F.interpolate(logits, size=label.shape[-2:], mode="bilinear").argmax(1)
        for row, predicted, true in zip(rows, answer, label[:, 0], strict=True):
            sums = overlap.setdefault(dataset.cases[row], np.zeros((dataset.num_classes - 1, 3)))
            for c in range(1, dataset.num_classes):
                p, t = (predicted == c) & (true != UNLABELLED), true == c
                sums[c - 1] += [float((p & t).sum()), float(p.sum()), float(t.sum())]
    both, predicted_sum, true_sum = np.moveaxis(np.stack(list(overlap.values())), -1, 0)  # each (cases, classes - 1)
    valid = true_sum > 0
    dice = 2 * both[valid] / (predicted_sum + true_sum)[valid]
    ratio = float(predicted_sum.sum() / max(1.0, true_sum.sum()))
    return AnswerScore(float(dice.mean()) if valid.any() else 0.0, float(np.mean(errors)), {"volume_ratio": ratio})


def decide(
    score: AnswerScore | None, student: AnswerScore | None, mode: str, margin: float, kind: str
) -> tuple[bool, str]:
    """Decide whether a teacher's answers are distilled, and say why, with both scores.

    Answers about whole images must beat the student's likelihood without ranking the cases worse: a cautious teacher
    that tells the classes apart less well than its student is not one to learn from.

    Args:
        score: of the teacher's answers; None if it gives none.
        student: of the undistilled student; None where it was not trained.
        mode: one of ``MODES``.
        margin: by which the teacher must beat the student.
        kind: of the teacher.
    """
    if score is None:
        return False, "it gives no answers"
    if mode != "cross_fit" or student is None:
        return mode == "all", f"admission is set to '{mode}'"
    measure = f"{score.name.capitalize()} {score.value:.3f}"
    if score.value < student.value + margin:
        return False, f"its {measure} does not beat the undistilled student's {student.value:.3f}"
    ranking, own = score.further.get("macro_auroc"), student.further.get("macro_auroc")
    if ranking is not None and own is not None and ranking < own:
        return False, f"its {measure} is better, but its macro AUROC {ranking:.3f} is below the student's {own:.3f}"
    ratio = score.further.get("volume_ratio", 1.0)
    if kind == "crossfit_volume_specialist" and abs(ratio - 1) > VOLUME_RATIO_TOLERANCE:
        return False, f"its volumes are {ratio:.2f} times the true ones"
    return True, f"its {measure} beats the undistilled student's {student.value:.3f}"


def prior_entropy(dataset: DecodedDataset) -> float:
    """Entropy in nats of the class frequencies over all labelled pixels or images: the error of a constant answer."""
    counts = np.zeros(dataset.num_classes)
    for i in np.flatnonzero(dataset.has_label):
        counts += np.bincount(dataset.labels[i].ravel(), minlength=dataset.num_classes)[: dataset.num_classes]
    frequency = (counts / counts.sum()).clip(1e-12)
    return float(-(frequency * np.log(frequency)).sum())
