"""Predict by ONNX Runtime alone: neither torch nor MONAI is imported, so that it starts at once."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from amkd_monai.atomic import atomic_path
from amkd_monai.export import inputs, outputs
from amkd_monai.export.steps import Grid, Inverse, largest_component, prepare, softmax
from amkd_monai.terminal import progress


class Predictor:
    """An exported student.

    Args:
        folder: what ``python -m amkd_monai export`` made.
        int8: use the network of 8 bits.
        threads: of ONNX Runtime; None leaves it to choose.

    Raises:
        ValueError: not an exported bundle, or the network is not in it.
    """

    def __init__(self, folder: str | Path, int8: bool = False, threads: int | None = None) -> None:
        folder = Path(folder)
        config = folder / "configs" / "predict.json"
        if not config.is_file():
            raise ValueError(f"{folder} is no exported bundle, it lacks configs/predict.json: run `export` first.")
        try:
            self.config: dict[str, Any] = json.loads(config.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{config} is not valid JSON: export again.") from error
        if self.config.get("version") != 1:
            raise ValueError(f"{config} is of another version of amkd_monai: update it, or export again.")
        name = "ort-int8" if int8 else "onnx"
        model = folder / self.config["models"].get(name, "-")
        if not model.is_file():
            raise ValueError(f"{folder} holds no {name} network: export again with --formats {name}.")
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as refusals

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except (
            refusals.Fail,
            refusals.InvalidArgument,
            refusals.InvalidGraph,
            refusals.InvalidProtobuf,
            refusals.NotImplemented,
            refusals.RuntimeException,
        ) as error:
            raise ValueError(f"{model} cannot be opened by ONNX Runtime: export again.") from error

    @property
    def is_classification(self) -> bool:
        """Whether an image has one class."""
        return bool(self.config["kind"] == "classification")

    def _answer(self, image: np.ndarray, grid: Grid | None) -> tuple[np.ndarray, list[Inverse]]:
        """Probabilities as the network gives them, (C,), (C, h, w) or (C, d, h, w), and the ways back."""
        array, inverses = prepare(image, self.config["steps"], grid)
        volume = array.ndim == 4
        batch = np.moveaxis(array, 0, 1) if volume else array[None]  # slices are the batch of a volume
        size = self.config["batch_size"]
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        run = self.session.run
        logits = np.concatenate([run(None, {"image": np.ascontiguousarray(p, np.float32)})[0] for p in parts])
        answer = softmax(logits, 1)
        return (np.moveaxis(answer, 0, 1) if volume else answer[0]), inverses

    def classes(self, image: np.ndarray) -> np.ndarray:
        """Probabilities (C,) of the classes of one picture (3, H, W) with levels 0 to 255."""
        return self._answer(image, None)[0]

    def mask(self, image: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Predict the label map of one image at its own resolution.

        Args:
            image: (3, H, W) with levels 0 to 255, or a volume (1, D, H, W).
            grid: of a volume.

        Returns:
            Labels (H, W) or (D, H, W), uint8.
        """
        answer, inverses = self._answer(image, grid)
        mask = np.zeros(image.shape[1:], np.uint8)
        highest: np.ndarray | None = None
        for label in range(len(answer)):  # one class at a time: a volume's probabilities are large
            found = answer[label : label + 1]
            for inverse in reversed(inverses):
                found = inverse(found)
            if highest is None:
                highest = found[0]
                continue
            better = found[0] > highest
            mask[better] = label
            highest = np.where(better, found[0], highest)
        for label in self.config["largest_component"]:
            mask = largest_component(mask, label).astype(np.uint8)
        return mask


def predict(
    model: str | Path, source: str | Path, output: str | Path, int8: bool = False, threads: int | None = None
) -> int:
    """Predict an image or a folder; a file that cannot be read is reported and the rest goes on.

    Args:
        model: exported bundle.
        source: image, volume, folder of them, or folder of a DICOM series.
        output: folder for overlays, and masks or ``predictions.csv``.
        int8: use the network of 8 bits.
        threads: of ONNX Runtime.

    Returns:
        Exit code: 1 if any file failed.

    Raises:
        ValueError: not an exported bundle, or there is nothing to predict.
        FileNotFoundError: ``source`` does not exist.
    """
    predictor = Predictor(model, int8, threads)
    items = inputs.find_inputs(source, predictor.config["dimensions"])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    failed = 0
    for item in progress(items, desc="predict"):
        try:
            _predict_one(predictor, item, folder, rows)
        except ValueError as error:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
    if rows:
        _write_rows(folder / "predictions.csv", predictor.config["classes"], rows)
    print(f"{len(items) - failed} of {len(items)} predicted, answers in {folder}")
    return 1 if failed else 0


def _predict_one(predictor: Predictor, item: inputs.Input, folder: Path, rows: list[list[Any]]) -> None:
    if predictor.config["dimensions"] == 3:
        volume, affine = inputs.read_volume(item)
        mask = predictor.mask(volume[None], inputs.grid_of(affine))
        outputs.write_volume(folder / f"{item.id}_mask.nii.gz", mask, affine, None if item.series else item.path)
        outputs.write_overlay(folder / f"{item.id}_overlay.png", *outputs.telling_slice(volume, mask))
        return
    image = inputs.read_picture(item.path)
    if predictor.is_classification:
        answer = predictor.classes(image)
        found = predictor.config["classes"][int(answer.argmax())]
        rows.append([item.id, found, *(f"{v:.6f}" for v in answer)])
        outputs.write_captioned(folder / f"{item.id}_overlay.png", image, f"{found}  {answer.max():.2f}")
        return
    mask = predictor.mask(image)
    outputs.write_mask(folder / f"{item.id}_mask.png", mask)
    outputs.write_overlay(folder / f"{item.id}_overlay.png", image, mask)


def _write_rows(path: Path, classes: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    columns = ["p_" + name.lower().replace(" ", "_") for name in classes]
    with atomic_path(path) as temporary, Path(temporary).open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([["id", "class", *columns], *rows])
