"""Active learning: the images whose labels the student needs most are those it is least sure about."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from amkd_monai.atomic import atomic_write_json
from amkd_monai.label.student import ServedStudent

BUDGET_S = 10.0
"""How long a client that asks for the next image waits, at most, for images to be scored."""


class UncertaintyScores:
    """Uncertainty of unlabelled images, kept in a file until the student changes.

    Args:
        student: who is asked.
        file: JSON beside the student's bundle. The datastore is not written, so no label is lost to a second process.
    """

    def __init__(self, student: ServedStudent, file: Path) -> None:
        self.student, self.file = student, file

    def update(self, datastore: Datastore, budget_s: float | None = None) -> dict[str, float]:
        """Score unlabelled images that have no score yet; return the scores by image id.

        Args:
            datastore: of the images.
            budget_s: start no further image after so many seconds; the first one is always scored.
        """
        images = {image: datastore.get_image_uri(image) for image in sorted(datastore.get_unlabeled_images())}
        suitable = {image: file for image, file in images.items() if self.student.takes(file)}
        identity = self.student.identity()
        known = self._read(identity)
        scores = {image: known[image] for image in suitable if image in known}
        start = time.monotonic()
        for image in suitable.keys() - scores.keys():
            if budget_s is not None and scores and time.monotonic() - start > budget_s:
                break
            scores[image] = self.student.uncertainty(suitable[image])
        if scores != known:
            atomic_write_json(self.file, {"student": identity, "scores": scores})
        return scores

    def _read(self, identity: str) -> dict[str, float]:
        if not self.file.is_file():
            return {}
        content = json.loads(self.file.read_text(encoding="utf-8"))
        scores: dict[str, float] = content["scores"] if content["student"] == identity else {}
        return scores


class MostUncertain(Strategy):
    """Give the unlabelled image with the highest uncertainty."""

    def __init__(self, scores: UncertaintyScores) -> None:
        super().__init__(f"The image that {scores.student.bundle.name} is least sure about")
        self.scores = scores

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return the id and its uncertainty, or None if every image has a label."""
        scores = self.scores.update(datastore, BUDGET_S)
        if not scores:
            return None
        image = max(sorted(scores), key=scores.__getitem__)
        return {"id": image, "uncertainty": scores[image]}


class ScoreUncertainty(ScoringMethod):
    """Score all unlabelled images."""

    def __init__(self, scores: UncertaintyScores) -> None:
        super().__init__(f"How unsure {scores.student.bundle.name} is about each unlabelled image")
        self.scores = scores

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Return the scores by image id."""
        return {"uncertainty": self.scores.update(datastore)}
