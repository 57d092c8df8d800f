"""The labels saved in the studies as a datalist for training."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from monailabel.interfaces.datastore import Datastore

from amkd_monai.data.datalist import Datalist
from amkd_monai.data.splits import Item
from amkd_monai.files.names import file_id
from amkd_monai.label.student import ServedStudent
from amkd_monai.label.studies import read_class
from amkd_monai.tasks import Task


def saved_labels(
    student: ServedStudent, datastore: Datastore, validation_part: float, with_unlabelled: bool
) -> Datalist:
    """List the images with a final label that a student can learn from, each its own group.

    Which ones are held out depends on their names alone, so that an image keeps its section when labels are added, up
    to the rounding of the part; with classes, each class is split by itself.

    Args:
        student: whose kind of image and label counts.
        datastore: of images and labels.
        validation_part: part of the labelled images that is held out.
        with_unlabelled: list the images without a label too; teachers can use them.

    Raises:
        ValueError: too few labels to train and to hold one out.
    """
    task = student.task
    if not 0 < validation_part < 1:
        raise ValueError(f"val_split is {validation_part}: give a part between 0 and 1.")
    items = [item for entry in datastore.datalist() if (item := _item(student, entry["image"], entry["label"]))]
    by_class: dict[object, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: hashlib.sha256(item["id"].encode()).digest()):
        by_class[item["label"] if task.is_classification else None].append(item)
    train: list[Item] = []
    validation: list[Item] = []
    for members in by_class.values():
        held_out = max(1, round(validation_part * len(members))) if len(members) > 1 else 0
        validation += members[:held_out]
        train += members[held_out:]
    if not validation or (task.is_classification and len({item["label"] for item in validation}) < 2):
        raise ValueError(f"{len(items)} final label(s) for {task.name} are too few: {_needed(task)}.")
    unlabelled: list[Item] = []
    if with_unlabelled:
        files = (datastore.get_image_uri(image) for image in sorted(datastore.get_unlabeled_images()))
        unlabelled = [_image(file) for file in files if student.takes(file)]
    root = Path(items[0]["image"]).parent
    return Datalist(task, root, "saved labels", train, validation, [], unlabelled)


def _item(student: ServedStudent, image: str, label: str) -> Item | None:
    """One labelled item, or None if it is another model's."""
    if not student.takes(image) or label.endswith(".json") != student.task.is_classification:
        return None
    if not student.task.is_classification:
        return {**_image(image), "label": label}
    name = read_class(Path(label))
    return {**_image(image), "label": student.task.classes.index(name)} if name in student.task.classes else None


def _image(file: str) -> Item:
    return {"image": file, "id": file_id(Path(file)), "group": file_id(Path(file))}


def _needed(task: Task) -> str:
    if task.is_classification:
        return "save two images of each of two classes at least"
    return "save two at least"
