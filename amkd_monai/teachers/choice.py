"""Chooses the teachers of a run: turns words such as ``auto`` into descriptions that suit the data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amkd_monai.data.datasets import Task
from amkd_monai.teachers import catalogue
from amkd_monai.teachers.base import validate_descriptions
from amkd_monai.teachers.catalogue import CATALOGUE, FOUNDATION, CatalogueEntry, find_weights, how_to_get
from amkd_monai.weights import CheckpointError

Description = Mapping[str, Any]
Official = tuple[CatalogueEntry, Path | None]  # a foundation teacher and its weight file, None where it was not found

CREWS: dict[str, Description] = {
    f"crew{'' if size == 'default' else f'_{size}'}": {"name": "crew", "kind": "crew", "size": size}
    for size in ("default", "small", "large")
}
"""Crews by word: ``crew``, ``crew_small`` and ``crew_large``."""


def choose(
    teachers: str | Sequence[str | Description],
    task: Task,
    weights_dir: str | None = None,
    fallback: Sequence[Description] = (),
) -> tuple[list[Description], list[str]]:
    """Return the descriptions of a run's teachers, and lines that announce those that were chosen here.

    Args:
        teachers: ``auto`` (the foundation teachers whose files are found, else ``fallback``), ``foundation`` (all
            four), ``none``, or names joined by ``+``, of foundation teachers, of :data:`CREWS` or of ``fallback``; or
            a list of such words and of descriptions.
        task: what is to be taught.
        weights_dir: folder searched first for weight files.
        fallback: descriptions of the teachers where no foundation teacher is found.
    """
    described: list[Description] = []
    lines: list[str] = []
    named = {str(other["name"]): other for other in fallback}
    offered = {**named, **CREWS, **named}  # in the order of the fallback, which also has the last word
    words = teachers.replace(" ", "").split("+") if isinstance(teachers, str) else teachers
    if not isinstance(words, (list, tuple)):
        raise ValueError(f"teachers is {teachers!r}: give a word or a list of descriptions, see docs/teachers.md.")
    for word in [] if words == ["none"] else words:
        if not isinstance(word, str) or word in offered:
            described.append(offered[word] if isinstance(word, str) else word)
            continue
        wanted = official_teachers(word, task, weights_dir, list(offered))
        if word == "auto":
            wanted = [(teacher, file) for teacher, file in wanted if file]
        elif absent := [how_to_get(teacher, weights_dir) for teacher, file in wanted if file is None]:
            raise CheckpointError(" ".join(absent))
        for teacher, file in wanted:
            if packages := catalogue.missing_packages(teacher):
                lines.append(f"{teacher.name} needs a package: run `pip install {packages[0]}`.")
                if word != "auto":
                    raise ValueError(lines[-1])
            else:
                name = teacher.key if word == teacher.key else teacher.kind
                described.append({"name": name, **options(teacher, task)})
                known = f"licence {teacher.licence}; these images seen in training: {seen(teacher, task)}"
                lines.append(f"{teacher.name} teaches: {file}, {known}.")
        if word == "auto" and not described:
            described += fallback
            names = " and ".join(str(other["name"]) for other in described) or "labels alone"
            places = ", ".join(map(str, catalogue.weights_folders(weights_dir)))
            how = "`python -m amkd_monai teachers` says how to get MedSAM, USFM, RETFound and BiomedParse"
            lines.append(f"No foundation teacher's file is in {places}, so {names} teach: {how}.")
    validate_descriptions(described)
    return described, lines


def official_teachers(
    word: str, task: Task, weights_dir: str | None = None, others: Sequence[str] = ()
) -> list[Official]:
    """Return the foundation teachers that a word means: one, or for ``auto`` and ``foundation`` all four.

    Of several files of one kind, such as RETFound's, one that was trained on the task's modality goes first. ``others``
    are named where the word is not understood, which is a ValueError.
    """
    kinds = FOUNDATION if word in ("auto", "foundation") else [word]
    chosen = []
    for kind in kinds:
        own = [e for e in CATALOGUE if e.kind in FOUNDATION and kind in (e.kind, e.key)]
        if not own:
            known = ", ".join(("auto", "foundation", "none", *FOUNDATION, *others))
            raise ValueError(f"teachers names '{word}': use one of {known}, several joined by +, or descriptions.")
        found = [(e, find_weights(e, weights_dir)) for e in sorted(own, key=lambda e: not suits(e, task))]
        chosen.append(next((official for official in found if official[1]), found[0]))
    return chosen


def suits(teacher: CatalogueEntry, task: Task) -> bool:
    """Whether a teacher was trained on images of a task's modality, or of many."""
    return teacher.domain.lower() in task.modality.lower()


def options(teacher: CatalogueEntry, task: Task) -> dict[str, Any]:
    """Return kind and options of a foundation teacher that are right for a task; the task's own exceptions go first.

    MedSAM gets no box, since a box of the label would know the label. Where an image has one class BiomedParse gets no
    prompt, as masks are no answer. RETFound's own framing cuts the border off, which only its own images can spare.
    """
    chosen: dict[str, Any] = {"kind": teacher.kind, "grid_limit": task.grid_limit}
    if teacher.kind == "medsam":
        chosen["prompt"] = "none"
    elif teacher.kind == "retfound":
        centred = task.is_classification and suits(teacher, task)
        chosen |= {"variant": teacher.key.removeprefix("retfound_"), "framing": "crop" if centred else "squash"}
    elif teacher.kind == "biomedparse":
        prompts = task.prompts or [f"{name} in {task.modality}" for name in task.classes[1:]]
        chosen["prompts"] = [] if task.is_classification else list(prompts)
    return chosen | dict(task.teacher_options.get(teacher.kind, {}))


def seen(teacher: CatalogueEntry, task: Task) -> str:
    """Say whether a foundation teacher may have seen a task's images in training, in a few words."""
    if task.source is None:
        return "your images only if they were public"
    masks = teacher.kind in ("medsam", "biomedparse")  # trained with masks, the others without labels
    possible = not task.is_classification if masks else suits(teacher, task)
    usual = f"possible{'' if masks else ', without labels'}" if possible else "no"
    other = "" if suits(teacher, task) else f"; trained on {teacher.domain} images alone"
    return task.seen_by.get(teacher.kind, usual) + other
