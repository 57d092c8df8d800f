"""The MONAI Label app: each bundle as a model, a trainer, a strategy and a scoring method."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import ImageNotFoundException
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from amkd_monai.label.active import MostUncertain, ScoreUncertainty, UncertaintyScores
from amkd_monai.label.fine_tune import FineTune
from amkd_monai.label.infer import StudentInferTask, SuitableImages
from amkd_monai.label.requests import answerable
from amkd_monai.label.student import ServedStudent
from amkd_monai.label.studies import Studies


class StudentApp(MONAILabelApp):
    """Students of trained bundles.

    Args:
        app_dir: folder made by :func:`amkd_monai.label.workplace.prepare`.
        studies: folder of images, or address of a DICOMweb server.
        conf: further settings of MONAI Label.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.work = Path(app_dir)
        names = json.loads((self.work / "models.json").read_text(encoding="utf-8"))
        self.students = {name: ServedStudent(self.work / "model" / name) for name in names}
        self.scores = {
            name: UncertaintyScores(student, student.bundle / "uncertainty.json")
            for name, student in self.students.items()
        }
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="amkd_monai",
            description="Distilled students. Research only, not for clinical use.",
        )

    def init_datastore(self) -> Datastore:
        """Open the studies; see :class:`amkd_monai.label.studies.Studies`."""
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        suffixes = {suffix for student in self.students.values() for suffix in student.suffixes}
        classifying = [student.task for student in self.students.values() if student.task.is_classification]
        classes = [name for task in classifying for name in task.classes]
        return Studies(self.studies, sorted(suffixes, key=len, reverse=True), classes)

    def init_infers(self) -> dict[str, InferTask]:
        """Each student as a model."""
        return {
            name: StudentInferTask(
                student,
                json.loads((student.bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["description"],
            )
            for name, student in self.students.items()
        }

    def init_trainers(self) -> dict[str, TrainTask]:
        """Fine-tuning of each student."""
        return {name: FineTune(student, self.work / "cache" / name) for name, student in self.students.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        """MONAI Label's own ``random``, and ``uncertainty_<model>``."""
        own = {f"uncertainty_{name}": MostUncertain(scores) for name, scores in self.scores.items()}
        return {**own, **super().init_strategies()}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """``uncertainty_<model>``."""
        return {f"uncertainty_{name}": ScoreUncertainty(scores) for name, scores in self.scores.items()}

    def init_batch_infer(self) -> BatchInferTask:
        """Inference on the images that the model takes."""
        return SuitableImages(self.students)

    def bundle_path(self, model: str | None) -> None:
        """Refuse a model that is not served before a process is started for it; a bundle needs no path of its own.

        Raises:
            MONAILabelException: no such model.
        """
        with answerable():
            if model is not None and model not in self.students:
                raise ValueError(f"There is no model '{model}': this server has {', '.join(self.students)}.")

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run a model on an image of the studies, or on an uploaded file."""
        self.bundle_path(request.get("model"))
        image = str(request.get("image"))
        if not self._is_upload(image) and not (datastore or self.datastore()).get_image_uri(image):
            raise ImageNotFoundException(f"There is no image '{image}' in the studies.")
        with answerable():
            result: dict[str, Any] = super().infer(request, datastore)
            return result

    def check_training(self, model: str | None, params: dict[str, Any] | None) -> None:
        """Refuse a training that cannot work before a process is started for it.

        Args:
            model: its name, or None for the trainings of all models, whose options ``params`` holds by name.
            params: options; see :meth:`amkd_monai.label.fine_tune.FineTune.config`.

        Raises:
            MONAILabelException: no such model, an option that cannot be used, or too few labels.
        """
        self.bundle_path(model)
        for name in [model] if model else self._trainers:
            own = params or {}
            with answerable():
                self._trainers[name].check(own if model else {**own.get(name, {}), **own}, self.datastore())

    def upload_model(self, model: str, file: BinaryIO) -> dict[str, Any]:
        """Replace a student by an uploaded file that fits its network; the one before is kept.

        Raises:
            MONAILabelException: no such model, or the file does not fit.
        """
        self.bundle_path(model)
        with tempfile.NamedTemporaryFile() as copy, answerable():
            shutil.copyfileobj(file, copy)
            copy.flush()
            self.students[model].replace(Path(copy.name))
        return dict(self.model_info(model))

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fine-tune a model."""
        with answerable():
            result: dict[str, Any] = super().train(request)
            return result

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Choose the next image to label."""
        with answerable():
            result: dict[str, Any] = super().next_sample(request)
            return result

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Score images."""
        with answerable():
            result: dict[str, Any] = super().scoring(request, datastore)
            return result

    def _is_upload(self, image: str) -> bool:
        """Whether this is a file that the server itself stored, not any file of the machine."""
        folders = [tempfile.gettempdir(), *([self._sessions.store_path] if self._sessions else [])]
        real = os.path.realpath(image)
        return Path(real).exists() and any(Path(real).is_relative_to(os.path.realpath(f)) for f in folders)
