"""The MONAI Label app: each bundle as a model, a trainer, a strategy and a scoring method."""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from monailabel.datastore import dicom
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import ImageNotFoundException
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from amkd_monai.data.decoded import BadSampleError
from amkd_monai.label.fine_tune import FineTune
from amkd_monai.label.student import ServedStudent, series_as_nifti, write_mask
from amkd_monai.label.studies import Studies
from amkd_monai.metrics.classification import class_row
from amkd_monai.storage import atomic_write_json, read_json, size_and_time

logger = logging.getLogger("amkd_monai")

BUDGET_S = 10.0  # how long a client that asks for the next image waits, at most, for images to be scored


class StudentApp(MONAILabelApp):
    """Students of the trained bundles that :func:`amkd_monai.label.server.prepare` has copied to ``app_dir``."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.work = Path(app_dir)
        names = json.loads((self.work / "models.json").read_text(encoding="utf-8"))
        self.students = {name: ServedStudent(self.work / "model" / name) for name in names}
        self.scores = {f"uncertainty_{name}": ScoreUncertainty(student) for name, student in self.students.items()}
        description = "Distilled students. Research only, not for clinical use."
        super().__init__(app_dir, studies, conf, "amkd_monai", description)

    def init_datastore(self) -> Datastore:
        """Open the studies."""
        if self.studies.startswith(("http://", "https://")):
            read = dicom.dicom_to_nifti  # reads segmentations; of series it would take gaps and tilt for whole volumes
            dicom.dicom_to_nifti = lambda path, is_seg=False: read(path, True) if is_seg else series_as_nifti(path)
            return super().init_datastore()
        suffixes = {suffix for student in self.students.values() for suffix in student.suffixes}
        tasks = [student.task for student in self.students.values()]
        return Studies(self.studies, sorted(suffixes, key=len, reverse=True), tasks)

    def init_infers(self) -> dict[str, InferTask]:
        """Each student as a model."""
        return {name: StudentInferTask(student) for name, student in self.students.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Fine-tuning of each student."""
        return {name: FineTune(student, self.work / "cache" / name) for name, student in self.students.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        """MONAI Label's own ``random``, and ``uncertainty_<model>``."""
        return {**{name: MostUncertain(scores) for name, scores in self.scores.items()}, **super().init_strategies()}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """``uncertainty_<model>``."""
        return dict(self.scores)

    def init_batch_infer(self) -> BatchInferTask:
        """Inference on the images that the model takes."""
        return SuitableImages(self.students)

    def bundle_path(self, model: str | None) -> None:
        """Refuse a model that is not served before a process is started for it; a bundle needs no path of its own."""
        if model is not None and model not in self.students:
            raise ValueError(f"There is no model '{model}': this server has {', '.join(self.students)}.")

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run a model on an image of the studies, or on an uploaded file; no other file of the machine is read."""
        self.bundle_path(request.get("model"))
        image = str(request.get("image"))
        uploads = [tempfile.gettempdir(), *([self._sessions.store_path] if self._sessions else [])]
        real = Path(image).resolve()
        is_upload = real.exists() and any(real.is_relative_to(Path(folder).resolve()) for folder in uploads)
        if not is_upload and not (datastore or self.datastore()).get_image_uri(image):
            raise ImageNotFoundException(f"There is no image '{image}' in the studies.")
        return dict(super().infer(request, datastore))

    def check_training(self, model: str | None, params: dict[str, Any] | None) -> None:
        """Refuse a training that cannot work before a process is started for it.

        Without a ``model`` all of them are trained, and ``params`` holds the options of each by its name.
        """
        self.bundle_path(model)
        own = params or {}
        for name in [model] if model else self._trainers:
            self._trainers[name].check(own if model else {**own.get(name, {}), **own}, self.datastore())

    def upload_model(self, model: str, file: BinaryIO) -> dict[str, Any]:
        """Replace a student by an uploaded file that fits its network; the one before is kept."""
        self.bundle_path(model)
        with tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            self.students[model].replace(Path(copy.name))
        return dict(self.model_info(model))


class StudentInferTask(InferTask):
    """One student as a model of the server.

    Segmentation gives a file with class indices on the grid of the image, classes and findings JSON without a file.
    """

    def __init__(self, student: ServedStudent) -> None:
        task, metadata = student.task, student.bundle / "configs" / "metadata.json"
        self.student = student
        super().__init__(
            type=InferType.CLASSIFICATION if task.is_classification else InferType.SEGMENTATION,
            labels={name: index for index, name in enumerate(task.classes) if task.is_classification or index},
            dimension=task.dimensions,
            description=json.loads(metadata.read_text(encoding="utf-8"))["description"],
        )

    def is_valid(self) -> bool:
        """Return True: a bundle that cannot be opened stops the start of the server instead."""
        return True

    def get_path(self, validate: bool = True) -> str:
        """Return the file of weights."""
        return str(self.student.model)

    def __call__(self, request: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Answer for the file ``request["image"]``: the mask file, which the caller removes, or None; and JSON."""
        start = time.perf_counter()
        answer = self.student.answer(request["image"]).numpy()
        file, facts, task = None, {"label_names": self.labels}, self.student.task
        if task.is_classification:
            scores = zip(task.classes, answer.tolist(), strict=True)
            facts["prediction"] = [{"idx": i, "label": n, "score": p} for i, (n, p) in enumerate(scores)]
            row = class_row(task, str(request["image"]), None, answer)
            facts["class"] = task.text_of(row["prediction"])
            if task.has_findings:  # in the form of a label
                facts["findings"] = {n: bool(row["prediction"] >> i & 1) for i, n in enumerate(task.classes)}
        else:
            file = str(write_mask(answer, request["image"]))
        return file, {**facts, "latencies": {"total": round(time.perf_counter() - start, 3)}}


class SuitableImages(BatchInferTask):
    """Inference on all images of the studies that the model takes: a folder may hold pictures and volumes."""

    def __init__(self, students: dict[str, ServedStudent]) -> None:
        self.students = students

    def __call__(self, request: dict[str, Any], datastore: Datastore, infer: Callable) -> dict[str, Any]:
        """Answer for each image; without a GPU on the CPU, where MONAI Label would look for a first GPU."""
        several = request.get("multi_gpu", True) and torch.cuda.is_available()
        return dict(super().__call__({**request, "multi_gpu": several}, datastore, infer))

    def get_images(self, request: dict[str, Any], datastore: Datastore) -> list[str]:
        """Return the ids of suitable images."""
        student = self.students[request["model"]]
        return list(student.suitable(datastore, super().get_images(request, datastore)))


class ScoreUncertainty(ScoringMethod):
    """Uncertainty of unlabelled images, kept in ``uncertainty.json`` of the bundle until student or image changes.

    The datastore is not written, so that no label is lost to a second process.
    """

    def __init__(self, student: ServedStudent) -> None:
        super().__init__(f"How unsure {student.bundle.name} is about each unlabelled image")
        self.student, self.file = student, student.bundle / "uncertainty.json"

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score all unlabelled images and return the scores by image id."""
        return {"uncertainty": self.update(datastore)}

    def update(self, datastore: Datastore, budget_s: float | None = None) -> dict[str, float]:
        """Score unlabelled images that have no score yet; return the scores by image id.

        After ``budget_s`` seconds no further image is started; the first one is always scored. An image that cannot be
        read has no score and a line in the log; a BadSampleError if no other is left.
        """
        suitable = self.student.suitable(datastore, sorted(datastore.get_unlabeled_images()))
        identity, content = self.student.identity(), read_json(self.file)
        known: dict[str, float] = content["scores"] if content.get("student") == identity else {}
        names, start = {image: f"{image} {size_and_time(file)}" for image, file in suitable.items()}, time.monotonic()
        scores = {image: known[name] for image, name in names.items() if name in known}
        unread: BadSampleError | None = None
        for image in suitable.keys() - scores.keys():
            if budget_s is not None and scores and time.monotonic() - start > budget_s:
                break
            try:
                scores[image] = self.student.uncertainty(suitable[image])
            except BadSampleError as error:
                logger.warning("%s has no score: %s", image, error)
                unread = error
        if unread is not None and not scores:
            raise unread
        if (named := {names[image]: score for image, score in scores.items()}) != known:
            atomic_write_json(self.file, {"student": identity, "scores": named})
        return scores


class MostUncertain(Strategy):
    """Give the unlabelled image with the highest uncertainty, or None if every image has a label."""

    def __init__(self, scoring: ScoreUncertainty) -> None:
        super().__init__(f"The image that {scoring.student.bundle.name} is least sure about")
        self.scoring = scoring

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return the id and its uncertainty."""
        scores = self.scoring.update(datastore, BUDGET_S)
        image = max(sorted(scores), key=scores.__getitem__, default=None)
        return None if image is None else {"id": image, "uncertainty": scores[image]}
