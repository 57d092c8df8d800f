"""Inference tasks of the server: masks for volumes and pictures, class probabilities for pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from amkd_monai.label.answers import class_answer, write_mask
from amkd_monai.label.student import ServedStudent


class StudentInferTask(InferTask):
    """One student as a model of the server.

    Segmentation gives a file with class indices on the grid of the image, classification JSON without a file.

    Args:
        student: the opened bundle.
        description: shown by clients.
    """

    def __init__(self, student: ServedStudent, description: str) -> None:
        task = student.task
        self.student = student
        super().__init__(
            type=InferType.CLASSIFICATION if task.is_classification else InferType.SEGMENTATION,
            labels={name: index for index, name in enumerate(task.classes) if task.is_classification or index},
            dimension=task.dimensions,
            description=description,
        )

    def is_valid(self) -> bool:
        """Whether it can be used; a bundle that cannot be opened stops the start of the server instead."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """Return the file of weights."""
        return str(self.student.model) if self.student.model.is_file() or not validate else None

    def __call__(self, request: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Answer for ``request["image"]``, a file.

        Returns:
            The mask file, which the caller removes, or None; and what is said about it.

        Raises:
            ValueError: the file cannot be read or is of another kind.
        """
        start = time.perf_counter()
        answer = self.student.answer(request["image"]).numpy()
        facts: dict[str, Any] = {"label_names": self.labels}
        if self.student.task.is_classification:
            file, facts = None, facts | class_answer(answer, self.student.task)
        else:
            file = str(write_mask(answer, request["image"]))
        facts["latencies"] = {"total": round(time.perf_counter() - start, 3)}
        return file, facts


class SuitableImages(BatchInferTask):
    """Inference on all images of the studies that the model takes: a folder may hold pictures and volumes.

    Args:
        students: by the name of the model.
    """

    def __init__(self, students: dict[str, ServedStudent]) -> None:
        self.students = students

    def __call__(self, request: dict[str, Any], datastore: Datastore, infer: Callable) -> dict[str, Any]:
        """Answer for each image; without a GPU on the CPU, where MONAI Label would look for a first GPU."""
        several = bool(request.get("multi_gpu", True)) and torch.cuda.is_available()
        result: dict[str, Any] = super().__call__({**request, "multi_gpu": several}, datastore, infer)
        return result

    def get_images(self, request: dict[str, Any], datastore: Datastore) -> list[str]:
        """Return the ids of suitable images."""
        student = self.students[request["model"]]
        return [i for i in super().get_images(request, datastore) if student.takes(Path(datastore.get_image_uri(i)))]
