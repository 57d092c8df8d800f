"""Prepare a run: do what is still missing, in order: teacher cache, probes, cross-fitting, admission."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from amkd_monai.cache.parts import Part
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.engines import admission
from amkd_monai.engines.build_cache import CacheOptions, cache_image_teacher, image_teachers
from amkd_monai.engines.candidates import Candidate, Preparation, source_of
from amkd_monai.engines.recipe import Recipe
from amkd_monai.engines.targets import TeacherTargets
from amkd_monai.memory import own_peak
from amkd_monai.teachers.registry import validate_descriptions

logger = logging.getLogger("amkd_monai")


def prepare_teachers(
    teachers: Sequence[Mapping[str, Any]],
    train: DecodedDataset,
    validation: DecodedDataset,
    student: nn.Module,
    recipe: Recipe,
    epochs: int,
    cache_dir: str,
    device: torch.device | str = "cpu",
    seed: int = 0,
    folds: int = 5,
    admission_options: Mapping[str, Any] | None = None,
    weights_dir: str | None = None,
    views: int = 1,
    cache_dtype: str = "float16",
    teacher_batch_size: int | None = None,
) -> TeacherTargets:
    """Return the targets of all teachers, computing what is still missing.

    Under torch.distributed all processes run image teachers, each over its part of the images; the rest is computed
    by the first one while the others wait, then read.

    Args:
        teachers: descriptions (``amkd_monai.teachers.registry``); an empty list means no distillation. One with
            ``own_answers`` False teaches its features, which a probe answers from: its answers are of another task.
        train: decoded training split, unlabelled samples included.
        validation: decoded validation split: fits the calibration temperatures.
        student: the undistilled student as it starts; copied, never changed.
        recipe: the run's training recipe.
        epochs: the run's length.
        cache_dir: folder of all stores.
        device: where teachers and students run.
        seed: of folds and trainings.
        folds: of probes and cross-fitted specialists.
        admission_options: ``mode`` (``cross_fit``: a teacher's answers are distilled only if their cross-fitted score,
            Dice or skill, beats the undistilled student's; ``all``; ``none``), ``features`` (``all``: also those of
            teachers that are not admitted; ``admitted``), ``margin`` (of the score), ``folds`` and ``epochs`` of the
            student's cross-fitting.
        weights_dir: folder searched first for the weights of foundation teachers.
        views: stored views of every training image; with several, the student is shown exactly these, and no other
            geometric change.
        cache_dtype: of stored feature maps, ``float16`` or ``int8``.
        teacher_batch_size: images per forward of a teacher, halved when memory runs out; None for 4 on a CPU, 64 on a
            GPU.

    Raises:
        ValueError: unknown kinds or options.
        CheckpointError: a teacher's weights are missing or wrong.
    """
    options = _options(admission_options or {}, epochs)
    validate_descriptions(teachers)
    stores = CacheOptions(cache_dir, device, views, cache_dtype, weights_dir, teacher_batch_size)
    preparation = Preparation(train, validation, student, recipe, epochs, stores, seed, folds)
    parallel = dist.is_available() and dist.is_initialized()
    if parallel:
        for description in image_teachers(teachers):
            cache_image_teacher(description, train, validation, stores, Part(dist.get_rank(), dist.get_world_size()))
        dist.barrier()
    if parallel and dist.get_rank() != 0:
        dist.barrier()
    candidates = [preparation.candidate(description) for description in teachers]
    record: dict[str, Any] = {"admission": dict(options)}
    student_score: admission.AnswerScore | None = None
    if options["mode"] == "cross_fit" and any(c.score is not None for c in candidates):
        best = max(c.score.value for c in candidates if c.score is not None) - float(options["margin"])
        student_score, length = preparation.student_score(int(options["folds"]), int(options["epochs"] or epochs), best)
        record |= {f"undistilled_student_{name}": value for name, value in student_score.record().items()}
        record["undistilled_student_epochs"] = length
    sources = []
    for candidate in candidates:
        admitted = _admit(candidate, student_score, options)
        if admitted or options["features"] == "all":
            sources.append(source_of(candidate, admitted))
    record["teachers"] = [c.record for c in candidates]
    record["preparation_peak_rss_mb"] = round(own_peak())
    if candidates and not sources:
        logger.warning("No teacher is admitted, and features are of admitted ones only: this run distils nothing.")
    if parallel and dist.get_rank() == 0:
        dist.barrier()
    return TeacherTargets(sources, admission.prior_entropy(train), record, train.groups, train.classes)


def _options(given: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """Complete the options of admission, or say what is wrong with them."""
    options = {"mode": "cross_fit", "features": "all", "margin": 0.01, "folds": 3, "epochs": epochs}
    unknown = set(given) - set(options)
    options |= given
    if unknown or options["mode"] not in admission.MODES or options["features"] not in ("all", "admitted"):
        raise ValueError(
            f"The admission options {dict(given)} are not understood: use mode (one of {', '.join(admission.MODES)}), "
            "features (all or admitted), margin, folds, epochs."
        )
    return options


def _admit(candidate: Candidate, student: admission.AnswerScore | None, options: Mapping[str, Any]) -> bool:
    """Decide whether a teacher's answers are distilled; log and record the decision with both scores."""
    record = candidate.record
    admitted, why = admission.decide(
        candidate.score, student, str(options["mode"]), float(options["margin"]), str(record["kind"])
    )
    record["outputs_admitted"], record["admission_reason"] = admitted, why
    record["features_admitted"] = candidate.features is not None and (admitted or options["features"] == "all")
    taught = [part for part in ("outputs", "features") if record[f"{part}_admitted"]]
    logger.info("teacher %s teaches %s (%s)", record["name"], " and ".join(taught) or "nothing", why)
    return admitted
