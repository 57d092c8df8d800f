"""What is exported: a training bundle, its trained student, and the images of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from torch import nn

from amkd_monai.data.readable import read_item
from amkd_monai.data.splits import Item
from amkd_monai.engines import runs
from amkd_monai.export import translate
from amkd_monai.tasks import Task, get_task
from amkd_monai.weights import CheckpointError, file_sha256, load_state_dict, load_strict


@dataclass
class Case:
    """One labelled image as the student sees it.

    Attributes:
        id: of the item.
        batch: (1, 3, H, W), or the slices of a volume (D, 3, H, W), float32 in [0, 1].
        label: label map (1 or D, H, W), or the class ().
    """

    id: str
    batch: np.ndarray
    label: np.ndarray


@dataclass
class Source:
    """A training bundle, opened.

    Attributes:
        bundle: its folder.
        task: what is asked.
        student: in evaluation mode, on the CPU.
        state: its flat state dict.
        transforms: MONAI transforms of an image, as config.
        steps: the same for prediction without MONAI.
        postprocessing: MONAI transforms of an answer, as config.
        inferer: as config, references resolved.
        metadata, record, metrics: ``metadata.json``; ``run.json`` and ``metrics.json`` of the run, empty if missing.
        unscored: why the figures that lie there are not this student's, if so.
        image_steps: what is done to an image, as :func:`amkd_monai.engines.runs.image_steps` tells.
        train, validation: items of the run.
        chain: transforms of the validation section, label included.
        is_phantom: whether the data are generated.
    """

    bundle: Path
    task: Task
    student: nn.Module
    state: dict[str, torch.Tensor]
    transforms: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    postprocessing: list[dict[str, Any]]
    inferer: dict[str, Any]
    metadata: dict[str, Any]
    record: dict[str, Any]
    metrics: dict[str, Any]
    unscored: str
    image_steps: list[dict[str, Any]]
    train: list[Item]
    validation: list[Item]
    chain: Compose
    is_phantom: bool

    def case(self, item: Item) -> Case:
        """Load one item."""
        data = read_item(item, self.chain)
        image = np.asarray(data["image"], np.float32)
        batch = image[None] if self.task.dimensions == 2 else np.moveaxis(image, 0, 1)
        if self.task.is_classification:
            return Case(str(item["id"]), batch, np.asarray(int(data["label"])))
        label = np.asarray(data["label"])[0]
        return Case(str(item["id"]), np.ascontiguousarray(batch), label[None] if self.task.dimensions == 2 else label)


def open_source(bundle: str | Path, settings: Mapping[str, Any], overlay: str = "") -> Source:
    """Open a training bundle with the settings its run had.

    Args:
        bundle: folder with ``configs/inference.json`` and ``configs/train.json``.
        settings: top-level settings that the run changed, such as ``dataset_dir``, ``ckpt_dir`` or ``image_size``.
        overlay: configs that the run put on top, such as ``volumes``.

    Raises:
        ValueError: not a bundle, an unknown setting, one that is not the run's, another split, or transforms without
            counterpart.
        CheckpointError: there is no trained student, or it is another network's.
    """
    bundle = Path(bundle)
    configs = {name: _config_files(bundle, name, overlay) for name in ("train", "inference", "metadata")}
    inference, training = (_parser(bundle, configs[name], settings) for name in ("inference", "train"))
    if unknown := [key for key in settings if key not in inference.config and key not in training.config]:
        raise ValueError(f"{bundle} has no setting '{unknown[0]}': use a top-level name of its configs.")
    model = Path(training.get_parsed_content("ckpt_dir")) / "model.pt"
    if not model.is_file():
        raise CheckpointError(
            f"There is no trained student at {model}: train the bundle, or add --set ckpt_dir=FOLDER."
        )
    identity = runs.adopt(training, "export", settings)
    if identity:
        runs.adopt(inference, "inference", settings)
    student, state = inference.get_parsed_content("network_def"), load_state_dict(model)
    load_strict(student, state, model)
    output = Path(training.get_parsed_content("output_dir"))
    record, metrics = runs.read_json(output / "run.json"), runs.read_json(output / "metrics.json")
    data, unscored = training.get_parsed_content("datalist"), ""
    if identity and record.get("run") != identity["run"]:
        record = {}
    if identity and metrics and metrics.get("student_sha256") != file_sha256(model):
        metrics, unscored = {}, f"the figures in {output.name}/metrics.json are another student's"
    transforms, steps = _translated(inference)
    task = get_task(inference.get_parsed_content("task"))
    return Source(
        bundle,
        task,
        student.eval(),
        state,
        transforms,
        steps,
        [
            translated
            for t in inference.config["postprocessing"]["transforms"]
            for translated in translate.postprocessing(t, task.dimensions)
        ],
        {k: _resolved(inference, f"inferer#{k}") for k in inference.config["inferer"]},
        ConfigParser.load_config_files([str(file) for file in configs["metadata"]]),
        record,
        metrics,
        unscored,
        runs.image_steps(inference, "preprocessing"),
        data.train,
        data.validation,
        training.get_parsed_content("validate#preprocessing"),
        data.is_phantom,
    )


def _config_files(bundle: Path, name: str, overlay: str) -> list[Path]:
    """A config, and what an overlay puts on top of it: ``volumes.json`` on ``train.json``, and so on."""
    on_top = overlay if name == "train" else f"{overlay}_{name}"
    files = [bundle / "configs" / f"{file}.json" for file in ((name, on_top) if overlay else (name,))]
    for file in files:
        if not file.is_file():
            what = "is no training bundle" if file.stem == name else f"has no overlay '{overlay}'"
            raise ValueError(f"{bundle} {what}, it lacks configs/{file.name}: give what lies in bundles/.")
    return files


def _parser(bundle: Path, files: Sequence[Path], settings: Mapping[str, Any]) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser["bundle_root"], parser["device"] = str(bundle), "cpu"
    for key, value in settings.items():
        if key in parser.config:
            parser[key] = value
    runs.expand(parser)
    return parser


def _translated(parser: ConfigParser) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    transforms, steps = [], []
    for number, raw in enumerate(parser.config["preprocessing"]["transforms"]):
        place = f"preprocessing#transforms#{number}"
        settings = {key: _resolved(parser, f"{place}#{key}") for key in raw if not key.startswith("_")}
        there, without = translate.preprocessing(raw["_target_"], settings)
        transforms += there
        steps += without
    return transforms, steps


def _resolved(parser: ConfigParser, place: str) -> Any:
    value = parser.get_parsed_content(place)
    return [float(v) if isinstance(v, float) else int(v) for v in value] if isinstance(value, tuple) else value


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many items, evenly over the list."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
