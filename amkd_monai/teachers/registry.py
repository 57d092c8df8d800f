"""The registry: which kinds of teacher exist, and how a description becomes one.

A description is plain data, so that teachers can be built one at a time:
``{"name": "lite2", "kind": "timm", "model": "tf_efficientnet_lite2"}``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amkd_monai.teachers.catalogue import CATALOGUE

if TYPE_CHECKING:
    from amkd_monai.teachers.base import Teacher

KINDS: dict[str, str] = {
    "timm": "amkd_monai.teachers.timm_encoder.TimmTeacher",
    "specialist": "amkd_monai.teachers.specialist.SpecialistTeacher",
    "student": "amkd_monai.teachers.timm_encoder.StudentTeacher",
    "medsam": "amkd_monai.teachers.medsam.MedSAMTeacher",
    "retfound": "amkd_monai.teachers.retfound.RETFoundTeacher",
    "usfm": "amkd_monai.teachers.usfm.USFMTeacher",
    "biomedparse": "amkd_monai.teachers.biomedparse.BiomedParseTeacher",
}
"""Teachers that answer image by image. To add one: one file with a ``Teacher``, and a line here or its path as kind."""

CROSS_FITTED_KINDS = ("crossfit_specialist", "crossfit_volume_specialist")
"""Teachers that are trained on the run's own training split, in folds (:mod:`amkd_monai.engines.crossfit`)."""


def validate_descriptions(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Check names and kinds before anything is built.

    Raises:
        ValueError: no list of descriptions, one without name or kind, an unknown kind, or a name used twice.
    """
    if isinstance(descriptions, str) or not all(isinstance(description, Mapping) for description in descriptions):
        raise ValueError(f"teachers is {descriptions!r}: give a list of descriptions, see docs/teachers.md.")
    seen: set[str] = set()
    for description in descriptions:
        name, kind = description.get("name"), description.get("kind")
        if not name:
            raise ValueError(f'The teacher {dict(description)} has no name: add "name" to its entry in `teachers`.')
        if kind not in KINDS and kind not in CROSS_FITTED_KINDS and "." not in str(kind):
            known = ", ".join((*KINDS, *CROSS_FITTED_KINDS))
            raise ValueError(
                f"The teacher '{name}' is of the unknown kind '{kind}': use one of {known}, or the path of your own "
                "class (module.Class)."
            )
        if name in seen:
            raise ValueError(f"Two teachers are named '{name}': give each its own name in `teachers`.")
        seen.add(str(name))


def teacher_class(kind: str) -> type[Teacher]:
    """Return the class of a kind: one of :data:`KINDS`, or the path of a class (``module.Class``).

    Raises:
        ValueError: there is no such class, or it is not a ``Teacher``.
    """
    from amkd_monai.teachers.base import Teacher

    module, _, name = KINDS.get(kind, kind).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The kind '{kind}' cannot be imported ({error}): check its path and PYTHONPATH.") from error
    if not (inspect.isclass(found) and issubclass(found, Teacher)):
        raise ValueError(f"The kind '{kind}' is not a Teacher: derive it from amkd_monai.teachers.base.Teacher.")
    return found


def build_teacher(description: Mapping[str, Any], weights_dir: str | None = None) -> Teacher:
    """Build one frozen teacher from its description.

    Args:
        description: ``name``, ``kind`` and the options of the kind; the preparation reads ``own_answers``.
        weights_dir: folder searched first where the kind has official weights and the description names none.

    Raises:
        ValueError: unknown kind, or options the kind does not take.
        CheckpointError: weights that are missing or do not fit.
    """
    validate_descriptions([description])
    name, kind = description["name"], description["kind"]
    if kind in CROSS_FITTED_KINDS:
        raise ValueError(
            f"The teacher '{name}' of the kind '{kind}' is trained on a run's own images, in folds: list it in "
            "`teachers` of a run (amkd_monai.engines.prepare)."
        )
    options = {k: v for k, v in description.items() if k not in ("kind", "own_answers")}
    if weights_dir is not None and any(e.key and e.kind == kind for e in CATALOGUE):
        options.setdefault("weights", weights_dir)
    chosen = teacher_class(kind)
    try:
        inspect.signature(chosen).bind(**options)
    except TypeError as error:
        raise ValueError(f"The teacher '{name}' has options that do not fit its kind: {error}.") from error
    return chosen(**options)
