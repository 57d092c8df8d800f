"""What is exported: a training bundle, its trained student, and the images of its run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser

from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import read_item
from amkd_monai.data.splits import Item
from amkd_monai.engines import runs
from amkd_monai.export import translate
from amkd_monai.metrics.run_folder import teachers_of
from amkd_monai.networks import VolumeStudent
from amkd_monai.weights import CheckpointError, file_sha256, load_state_dict, load_strict


class Case(NamedTuple):
    """One labelled image as the student sees it."""

    id: str  # of the item
    batch: np.ndarray  # (1, C, H, W), or the slices of a volume (D, C, H, W), float32 in [0, 1]
    label: np.ndarray  # label map (1 or D, H, W), or the class ()


UNDISTILLED = {
    "name": (", distilled student", ", undistilled student"),
    "description": ("labels and with the features and outputs of several frozen teachers", "labels alone"),
}
"""Words of a bundle's ``metadata.json`` that do not hold for a student without teachers, and those that do."""


class Source:
    """A training bundle, opened with the settings its run had.

    Args:
        bundle: folder with ``configs/inference.json`` and ``configs/train.json``, else a ValueError.
        settings: top-level settings that the run changed, such as ``dataset_dir``; unknown ones, and those that are not
            the run's, are a ValueError.
        overlay: configs that the run put on top, such as ``volumes``.

    Transforms without counterpart are a ValueError; no trained student, or another network's, is a CheckpointError.

    Attributes:
        student: in evaluation mode, on the CPU; ``state`` is its flat state dict, ``network`` its class as config.
        transforms: MONAI transforms of an image, as config; ``steps`` are the same for prediction without MONAI.
        postprocessing: MONAI transforms of an answer, as config.
        inferer: as config, references resolved; ``window`` are its settings for prediction without MONAI if the
            student is a 3D one, else None.
        metadata: ``metadata.json``, in the words of an undistilled student if no teacher taught this one.
        record, metrics: ``run.json`` and ``metrics.json`` of the run, empty if missing.
        taught: records of the teachers that taught the student something.
        identity: ``student.json`` of the run, empty if missing.
        mask_codes: meaning of the values of masks in the training.
        unscored: why ``metrics.json`` is not about this student, if so.
        data: the datalist of the run.
    """

    def __init__(self, bundle: str | Path, settings: Mapping[str, Any], overlay: str = "") -> None:
        self.bundle = Path(bundle)
        configs = {name: config_files(self.bundle, name, overlay) for name in ("train", "inference", "metadata")}
        inference, training = (_parser(self.bundle, configs[name], settings) for name in ("inference", "train"))
        if unknown := [key for key in settings if key not in inference.config and key not in training.config]:
            raise ValueError(f"{bundle} has no setting '{unknown[0]}': use a top-level name of its configs.")
        model = Path(training.get_parsed_content("ckpt_dir")) / "model.pt"
        if "task_set" in training.config:
            how = f"train the bundle of one from its student (--init_from {model}) and export that"
            raise ValueError(f"{bundle} has several data sets: {how}.")
        if not model.is_file():
            raise CheckpointError(f"There is no trained student at {model}: train it, or add --set ckpt_dir=FOLDER.")
        self.identity = runs.adopt(training, "export", settings)
        if self.identity:
            runs.adopt(inference, "inference", settings)
        self.mask_codes = training.get_parsed_content("mask_codes") if "mask_codes" in training.config else "auto"
        self.task = get_task(inference.get_parsed_content("task"))
        self.student = inference.get_parsed_content("network_def").eval()
        load_strict(self.student, load_state_dict(model), model)
        self.state = dict(self.student.state_dict())
        output, self.data = Path(training.get_parsed_content("output_dir")), training.get_parsed_content("datalist")
        self.record, self.metrics = (runs.read_json(output / name) for name in ("run.json", "metrics.json"))
        if self.identity and self.record.get("run") != self.identity["run"]:
            self.record = {}
        split = self.metrics.get("data", {}).get("split_hash", self.data.hash)
        of = "other data or options" if self.metrics.get(runs.OVERRIDDEN) or split != self.data.hash else ""
        if self.identity and self.metrics and self.metrics.get("student_sha256") != file_sha256(model):
            of = "another student"
        self.unscored = of and f"the figures in {output.name}/metrics.json are for {of}"
        self.metrics = {} if of else self.metrics
        self.transforms, self.steps = list[dict[str, Any]](), list[dict[str, Any]]()
        for number, raw in enumerate(inference.config["preprocessing"]["transforms"]):
            values = resolved(inference, f"preprocessing#transforms#{number}", raw)
            transforms, steps = translate.preprocessing(values.pop("_target_"), values, bool(self.task.channels))
            self.transforms += transforms
            self.steps += steps
        self.network = resolved(inference, "network_def", inference.config["network_def"])
        answers, is_mask = inference.config["postprocessing"]["transforms"], not self.task.is_classification
        self.postprocessing = translate.postprocessing(answers, is_mask, self.task.dimensions)
        self.inferer = resolved(inference, "inferer", inference.config["inferer"])
        self._infer = inference.get_parsed_content("inferer")
        self.window = translate.window(self.inferer, isinstance(self.student, VolumeStudent))
        self.metadata = ConfigParser.load_config_files([str(file) for file in configs["metadata"]])
        self.taught = teachers_of(self.record)[1]
        if "distillation" in self.record and not self.taught:
            for key, (distilled, alone) in UNDISTILLED.items():
                self.metadata[key] = self.metadata[key].replace(distilled, alone)
        self._chain = training.get_parsed_content("validate#preprocessing")

    def case(self, item: Item) -> Case:
        """Load one item."""
        data = read_item(item, self._chain)
        image, label = np.asarray(data["image"], np.float32), np.asarray(data["label"])
        batch = image[None] if self.task.dimensions == 2 else np.ascontiguousarray(np.moveaxis(image, 0, 1))
        if self.task.is_classification:
            label = np.asarray(int(label))
        elif self.task.dimensions == 3:
            label = label[0]
        return Case(str(item["id"]), batch, label)

    def logits_of(self, case: Case) -> np.ndarray:
        """Logits of a case by the bundle's own inferer: (B, classes, H, W), (1, classes) or (1, 2, F) of findings."""
        image = torch.from_numpy(case.batch)
        with torch.inference_mode():
            if self.task.dimensions == 2:
                return np.asarray(self._infer(image, self.student))
            return np.asarray(self._infer(image.transpose(0, 1)[None], self.student)[0].transpose(0, 1))


def config_files(bundle: Path, name: str, overlay: str) -> list[Path]:
    """Return a config and what an overlay puts on it, ``volumes.json`` on ``train.json``; else a ValueError."""
    on_top = overlay if name == "train" else f"{overlay}_{name}"
    files = [bundle / "configs" / f"{file}.json" for file in ((name, on_top) if overlay else (name,))]
    for file in files:
        if not file.is_file():
            what = "is not a training bundle" if file.stem == name else f"has no overlay '{overlay}'"
            raise ValueError(f"{bundle} {what}, it lacks configs/{file.name}: give a folder of bundles/.")
    return files


def _parser(bundle: Path, files: Sequence[Path], settings: Mapping[str, Any]) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser.update({"bundle_root": str(bundle), "device": "cpu"})
    parser.update({key: value for key, value in settings.items() if key in parser.config})
    runs.expand(parser)
    return parser


def resolved(parser: ConfigParser, place: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """A block of a config, and those within it, with their references resolved, tuples as lists."""
    found = {}
    for key, raw in block.items():
        if key[0] == "_":
            found[key] = raw
        elif isinstance(raw, Mapping) and "_target_" in raw:
            found[key] = resolved(parser, f"{place}#{key}", raw)
        else:
            value = parser.get_parsed_content(f"{place}#{key}")
            if not isinstance(value, (str, int, float, list, tuple, dict, NoneType)):
                what = f"{place}#{key} is {raw!r}, which cannot be exported"
                raise ValueError(f"{what}: write its class and arguments in its place.")
            found[key] = np.array(value).tolist() if isinstance(value, tuple) else value
    return found
