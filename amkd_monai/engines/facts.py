"""The facts of a training for its run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from amkd_monai.data.datalist import Datalist
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.distillation import DistillationConfig
from amkd_monai.engines.recipe import Recipe
from amkd_monai.engines.targets import TeacherTargets


def run_facts(
    datalist: Datalist,
    targets: TeacherTargets,
    recipe: Recipe,
    train: DecodedDataset,
    validation: DecodedDataset,
    student: nn.Module,
    distillation: DistillationConfig,
    method: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Return the JSON-able facts of a run: data and split, teachers, method, recipe, student and settings.

    ``is_test`` marks a run with a teacher of random weights: its scores mean nothing.
    """
    teachers = targets.record["teachers"]
    return {
        "is_test": any(teacher.get("random_weights") for teacher in teachers),
        "data": datalist.describe(),
        "skipped_samples": {"train": train.skipped, "validation": validation.skipped},
        "training_samples": len(train),
        "labelled_samples": int(train.has_label.sum()),
        "distillation": targets.record if teachers else "none: the undistilled student",
        **distillation.facts(**method),
        **settings,
        "recipe": recipe.describe(),
        "student_parameters": sum(p.numel() for p in student.parameters()),
    }


def shared_facts(
    tasks: Mapping[str, Mapping[str, Any]],
    missing: Sequence[str],
    distillation: DistillationConfig,
    method: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Return the JSON-able facts of a run on several tasks: each task's facts, missing tasks, method and settings."""
    settings = {**distillation.facts(**method), **settings}
    is_test = any(facts["is_test"] for facts in tasks.values())
    phantom = any(facts["data"]["phantom"] for facts in tasks.values())
    return {"is_test": is_test, "phantom": phantom, "missing_tasks": list(missing), **settings, "tasks": dict(tasks)}
