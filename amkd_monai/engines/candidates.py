"""What is computed about one teacher before it is admitted: features, answers, calibration, score.

Every step keeps its result under a name derived from what it depends on; a second call finds it there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amkd_monai.cache import probes
from amkd_monai.cache.build import answers_store, keep_answers
from amkd_monai.cache.inventory import bytes_per_image
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.distillation import TeacherSpec
from amkd_monai.engines import admission, crossfit
from amkd_monai.engines.build_cache import CacheOptions, cache_image_teacher
from amkd_monai.engines.recipe import Recipe
from amkd_monai.engines.targets import TeacherSource
from amkd_monai.engines.volume_specialist import fit_volumes, predict_volumes
from amkd_monai.teachers.registry import CROSS_FITTED_KINDS

logger = logging.getLogger("amkd_monai")


@dataclass
class Candidate:
    """A teacher with all that was computed about it, before admission."""

    description: Mapping[str, Any]
    record: dict[str, Any]
    features: FeatureStore | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    answers: FeatureStore | None = None
    validation_answers: FeatureStore | None = None
    temperature: float = 1.0
    score: admission.AnswerScore | None = None


class Preparation:
    """What the steps of the preparation share.

    The arguments are those of :func:`prepare_teachers`.
    """

    def __init__(
        self,
        train: DecodedDataset,
        validation: DecodedDataset,
        student: nn.Module,
        recipe: Recipe,
        epochs: int,
        options: CacheOptions,
        seed: int,
        folds: int,
    ) -> None:
        self.train, self.validation, self.student, self.recipe = train, validation, student, recipe
        self.options, self.epochs = options, epochs
        self.cache_dir, self.device = str(Path(options.cache_dir)), options.device
        self.seed, self.folds = seed, folds

    def candidate(self, description: Mapping[str, Any]) -> Candidate:
        """Compute a teacher's features and answers; one teacher is in memory at a time."""
        crossed = description["kind"] in CROSS_FITTED_KINDS
        candidate = self._cross_fitted(description) if crossed else self._image_teacher(description)
        if candidate.answers is not None and candidate.validation_answers is not None:
            self._check_shape(str(candidate.record["name"]), candidate.answers)
            candidate.temperature = self._calibrate(candidate.validation_answers)
            candidate.score = admission.score_answers(candidate.answers, self.train, candidate.temperature)
            candidate.record.update(candidate.score.record())
            candidate.record["calibration_temperature"] = round(candidate.temperature, 3)
        return candidate

    def _image_teacher(self, description: Mapping[str, Any]) -> Candidate:
        teacher, features, validation = cache_image_teacher(description, self.train, self.validation, self.options)
        record = {
            "name": teacher.name,
            "kind": description["kind"],
            "fingerprint": teacher.fingerprint,
            "licence": teacher.licence,
            "random_weights": teacher.is_random,
            "weights": teacher.weights_file,
            "stored": {
                "views": features.views,
                "dtype": self.options.dtype,
                "bytes_per_image": round(bytes_per_image(features)),
            },
        }
        if teacher.is_random:
            logger.warning("The teacher '%s' has RANDOM weights: this run is a test, not a result.", teacher.name)
        candidate = Candidate(description, record)
        if "grid" in features.arrays:
            candidate.features = features
            candidate.mean, candidate.std = probes.channel_statistics(features)
        if description.get("own_answers", True) and self._answers_with_masks(teacher.name, features):
            record["answers"] = "its own"
            candidate.answers, candidate.validation_answers = features, validation
        elif candidate.features is not None:
            record["answers"] = f"linear probe, cross-fitted in {self.folds} folds"
            candidate.answers, candidate.validation_answers = self._probe(teacher.fingerprint, candidate, validation)
        return candidate

    def _answers_with_masks(self, name: str, features: FeatureStore) -> bool:
        """Whether a teacher's own answers are masks of this task's classes; answers about whole images are not."""
        if "logits" not in features.arrays or len(features.arrays["logits"].shape) != 3:
            return False
        classes = features.arrays["logits"].shape[0]
        if classes != self.train.num_classes:
            raise ValueError(
                f"The teacher '{name}' answers with {classes} classes, but the task has {self.train.num_classes}: give "
                "a teacher of this task, or one without answers of its own."
            )
        return True

    def _probe(
        self, fingerprint: str, candidate: Candidate, validation_features: FeatureStore
    ) -> tuple[FeatureStore, FeatureStore]:
        features, mean, std = candidate.features, candidate.mean, candidate.std
        assert features is not None and mean is not None and std is not None
        size = (int(features.arrays["grid"].shape[1]), int(features.arrays["grid"].shape[2]))
        array = "grid"
        if self.train.classes is not None:  # one answer per image, from the teacher's pooled vector
            array, size = "pooled", (1, 1)
            mean, std = probes.channel_statistics(features, array)
        key = {
            "probe": f"linear-1-{array}",
            "teacher": fingerprint,
            "folds": self.folds,
            "seed": self.seed,
            "labels": self.train.hashes,
            "labelled": np.flatnonzero(self.train.has_label).tolist(),
        }
        name = str(candidate.record["name"])
        train = answers_store(name, {**key, "of": "train"}, self.train, size, self.cache_dir)
        validation = answers_store(name, {**key, "of": "validation"}, self.validation, size, self.cache_dir)
        if not (train.is_complete and validation.is_complete):
            logits, fitted = probes.cross_fit_probes(features, self.train, mean, std, self.folds, self.seed, array)
            keep_answers(train, logits)
            everything = np.arange(len(self.validation))
            keep_answers(validation, probes.answer(validation_features, everything, mean, std, fitted, array))
        return train, validation

    def _cross_fitted(self, description: Mapping[str, Any]) -> Candidate:
        name = str(description["name"])
        network = description.get("network")
        if not isinstance(network, nn.Module):
            raise ValueError(f"The teacher '{name}' needs a network: add \"network\" to its entry in `teachers`.")
        folds = int(description.get("folds", self.folds))
        if description["kind"] == "crossfit_volume_specialist":
            if self.train.classes is not None:
                raise ValueError(
                    f"The teacher '{name}' answers volumes with masks, this task asks for classes: drop it."
                )
            patch = tuple(int(n) for n in description.get("patch_size", (64, 64, 64)))
            steps, rate = int(description.get("steps", 300)), float(description.get("learning_rate", 2e-3))
            fit = fit_volumes(patch, steps, rate, self.seed, self.device)  # type: ignore[arg-type]
            predict = predict_volumes(patch, self.device)  # type: ignore[arg-type]
            key: dict[str, Any] = {"volume": [patch, steps, rate]}
        else:
            epochs = int(description.get("epochs", self.epochs))
            fit = crossfit.fit_student(self.recipe, epochs, self.seed, self.device, name)
            predict, key = crossfit.predict_student, {"recipe": self.recipe.describe(), "epochs": epochs}
        answers, validation = crossfit.cross_fit(
            name, network, self.train, self.validation, fit, predict, key, folds, self.seed, self.cache_dir
        )
        record = {"name": name, "kind": description["kind"], "answers": f"cross-fitted in {folds} folds"}
        record["fingerprint"] = answers.directory.name
        return Candidate(description, record, answers=answers, validation_answers=validation)

    def _calibrate(self, store: FeatureStore) -> float:
        return _temperature(store, self.validation)

    def _check_shape(self, name: str, store: FeatureStore) -> None:
        """Refuse answers of another kind than the labels, or with another number of classes."""
        classes, *size = store.arrays["logits"].shape
        single = tuple(size) == (1, 1)
        if classes != self.train.num_classes or single != (self.train.classes is not None):
            wanted = "one answer per image" if self.train.classes is not None else "a map of answers"
            raise ValueError(
                f"The teacher '{name}' gives logits of shape {(classes, *size)}, the task asks for {wanted} with "
                f"{self.train.num_classes} classes: give a teacher of this task, or drop it."
            )

    def student_score(self, folds: int, epochs: int, best_teacher: float) -> tuple[admission.AnswerScore, int]:
        """Cross-fit the undistilled student with the run's own recipe and score it.

        A quarter of the length comes first: where the student is ahead of every teacher by then, the whole length
        would decide alike.

        Args:
            folds: number of folds.
            epochs: whole length.
            best_teacher: score to reach, the margin taken off.

        Returns:
            The score and the length it took, in epochs.
        """
        length = max(1, epochs // 4)
        score = self._student_score(folds, length)
        if score.value <= best_teacher and length < epochs:
            score, length = self._student_score(folds, epochs), epochs
        return score, length

    def _student_score(self, folds: int, epochs: int) -> admission.AnswerScore:
        fit = crossfit.fit_student(self.recipe, epochs, self.seed, self.device, "undistilled student")
        key = {"recipe": self.recipe.describe(), "epochs": epochs}
        predict = crossfit.predict_student
        answers, _ = crossfit.cross_fit(
            "student", self.student, self.train, None, fit, predict, key, folds, self.seed, self.cache_dir
        )
        # masks are scored by Dice, which knows no temperature; classes by likelihood, for which teachers are calibrated
        temperature = 1.0 if self.train.classes is None else _temperature(answers, self.train)
        return admission.score_answers(answers, self.train, temperature)


def _temperature(store: FeatureStore, dataset: DecodedDataset) -> float:
    """Calibration temperature of cached answers on a dataset's labels."""
    rows = np.flatnonzero(dataset.has_label)
    size = store.arrays["logits"].shape[1:]
    targets = probes.cell_targets(dataset, rows, dataset.num_classes, (size[0], size[1]))
    return probes.calibration_temperature(torch.from_numpy(store.read("logits", rows)).float(), targets)


def source_of(candidate: Candidate, admitted: bool) -> TeacherSource:
    """Return what a run reads of a teacher; its answers are distilled if it is admitted."""
    features, answers = candidate.features, candidate.answers
    spec = TeacherSpec(
        name=str(candidate.record["name"]),
        grid=_shape(features, "grid"),
        mean=candidate.mean,
        std=candidate.std,
        logits=_shape(answers, "logits"),
        admitted=admitted,
        mean_error=None if candidate.score is None else candidate.score.cross_entropy,
        score=None if candidate.score is None else candidate.score.value,
    )
    return TeacherSource(spec, features, answers, candidate.temperature, candidate.record)


def _shape(store: FeatureStore | None, array: str) -> tuple[int, int, int] | None:
    if store is None:
        return None
    channels, height, width = store.arrays[array].shape
    return int(channels), int(height), int(width)
