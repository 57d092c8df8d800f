"""Predict by ONNX Runtime alone, without importing torch or MONAI."""

import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from amkd_monai.export.runners import runner
from amkd_monai.export.windows import logits_of
from amkd_monai.files import names, pictures
from amkd_monai.files.cases import read_case, series_folders
from amkd_monai.files.dicom import Slice, find_series, read_series
from amkd_monai.files.dicom_seg import write_captures, write_segmentation
from amkd_monai.files.steps import Inverse, largest_component, prepare, softmax
from amkd_monai.files.volumes import Grid, grey_levels, seen_slice, write_mask_volume
from amkd_monai.storage import atomic_path, file_sha256, read_json
from amkd_monai.terminal import logger, progress

VERSION = 3  # of ``configs/predict.json``
SEEN = "docs/seen.json"  # file of an exported bundle with the fingerprints of the images that the student has seen
OPACITY = 0.35  # of masks in overlays
LETTERED_WIDTH = 320  # pixels of width, at least, for which letters are made


def predict(
    predictor: "Predictor",
    source: str | Path,
    output: str | Path,
    dicom_seg: bool = False,
    dicom_captures: bool = False,
) -> int:
    """Predict an image or a folder; a file that cannot be read is reported, the rest goes on, and 1 is returned.

    ``source`` is an image, a volume, a folder of them, or of a DICOM series; nothing there is a FileNotFoundError.
    Overlays and masks, or ``predictions.csv``, go to the folder ``output``. Of a DICOM series (else a ValueError) also
    the mask as DICOM segmentation, and overlays of all slices as secondary captures.
    """
    images = predictor.images(source)
    if (dicom_seg or dicom_captures) and not any(image.slices for image in images):
        raise ValueError(f"{source} holds no DICOM series, which DICOM output needs: leave out its options.")
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rows, failed = [], 0
    for image in progress(images, desc="predict"):
        try:
            if row := _predict_one(predictor, image, folder, dicom_seg, dicom_captures):
                rows.append(row)
        except refusals() as error:
            failed += 1
            reason = " ".join(str(error).split()) or "it does not fit into memory"
            place = "" if str(image.files[0]) in reason else f"{image.files[0]} cannot be predicted: "
            tqdm.write(f"error: {place}{reason}", file=sys.stderr)
    if rows:
        columns = ["p_" + name.lower().replace(" ", "_") for name in predictor.config["classes"]]
        with (
            atomic_path(folder / "predictions.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8") as f,
        ):
            csv.writer(f, lineterminator="\n").writerows([["id", "class", *columns], *rows])
    print(f"{len(images) - failed} of {len(images)} predicted, results in {folder}")
    return 1 if failed else 0


class Input(NamedTuple):
    """One image: the name of the answer's files, its files, one per channel, or the folder of a series, its slices."""

    id: str
    files: Sequence[str | Path]
    slices: Sequence[Slice] = ()


class Predictor:
    """An exported student: the folder that ``python -m amkd_monai export`` made, opened by ONNX Runtime."""

    def __init__(self, folder: Path, int8: bool = False, threads: int | None = None) -> None:
        self.folder, file, name = folder, folder / "configs" / "predict.json", "ort-int8" if int8 else "onnx"
        self.config = read_json(file)
        if not self.config:
            raise ValueError(f"{folder} is not an exported bundle: it lacks configs/predict.json: run `export` first.")
        if self.config.get("version") != VERSION:
            raise ValueError(f"{file} is of another version of amkd_monai: update it, or export again.")
        self.model, self.channels = folder / self.config["models"].get(name, "-"), self.config["channels"]
        if not self.model.is_file():
            raise ValueError(f"{folder} holds no {name} network: export again with --formats {name}.")
        if self.config.get("sha256", {}).get(name) not in (None, file_sha256(self.model)):
            raise ValueError(f"{self.model} is damaged or of another export (its SHA-256 differs): copy it again.")
        try:
            self._run = runner(name, self.model, threads or 0)
        except refusals() as error:
            raise ValueError(f"{self.model} cannot be opened by ONNX Runtime: export again.") from error

    def images(self, source: str | Path) -> list[Input]:
        """List the images of a file, a folder, or a folder of DICOM series; masks and predictions are left out.

        Images of several channels are those of a folder whose files end in ``_0000``, ``_0001`` and so on, or NIfTI
        volumes of four axes. Nothing there is a FileNotFoundError, no image of this model's kind a ValueError.
        """
        path, dimensions, channels = Path(source).expanduser(), self.config["dimensions"], self.channels
        suffixes = names.PICTURE_SUFFIXES if dimensions == 2 else names.VOLUME_SUFFIXES
        kinds = {2: "pictures (PNG, JPEG, TIFF, BMP, .dcm)", 3: "volumes (NIfTI, or a folder of one DICOM series)"}
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give an image or a folder.")
        cases = names.channel_files(path, suffixes) if channels > 1 else {}
        wrong = [case for case, files in cases.items() if sorted(files) != list(range(channels))]
        if wrong or (channels > 1 and dimensions == 2 and not cases):
            ends, of = " and ".join(f"_{channel:04d}" for channel in range(channels)), names.some(wrong) or "its images"
            remedy = f"give {channels} files an image, ending in {ends}, no others"
            raise ValueError(f"{path} lacks channels of {of}: {remedy}.")
        if cases:
            return [Input(case, [files[k] for k in sorted(files)]) for case, files in sorted(cases.items())]
        if path.is_file() and names.has_suffix(path, suffixes):
            if names.is_prediction(path):
                raise ValueError(f"{path} is a prediction: give the image it was made from.")
            return [Input(names.file_id(path), [path])]
        below = series_folders(path) if path.is_dir() and dimensions == 3 else []
        files = names.images_to_predict(path, suffixes, below) if path.is_dir() else {}
        found = {name: Input(name, [file]) for name, file in files.items()}
        if path.is_dir() and dimensions == 3:
            for resolved, folder in {f.resolve(): f for f in (path, *below)}.items():
                series = find_series(folder)
                for number, slices in enumerate(series, 1):
                    name = names.printable(resolved.name) + (f"_{number}" if len(series) > 1 else "")
                    while name in found:
                        name += "_"
                    found[name] = Input(name, [folder], slices)
        if not found:
            raise ValueError(f"{path} holds nothing that fits the model: it takes {kinds[dimensions]}.")
        return list(found.values())

    def answer(self, image: str | Path) -> np.ndarray:
        """Predict a file, or a folder of one DICOM series: a label map, or probabilities (C,) of classes or findings.

        The map is uint8, (H, W) or (X, Y, Z) in the order of the volume. No such file is an OSError; one that cannot be
        read, does not fit the student, or holds several images is a ValueError.
        """
        images = self.images(image)
        if len(images) > 1:
            raise ValueError(f"{image} holds {len(images)} images: give one of them, or use the command `predict`.")
        return self.answered(images[0])[2]

    def answered(self, image: Input) -> tuple[np.ndarray, Grid | None, np.ndarray]:
        """Return an image (C, H, W), or a volume (C, X, Y, Z) and its grid, and its label map or probabilities (C,)."""
        array, grid = self.read(image)
        seen = [s for s in self.config["steps"] if s["step"] in ("orientation", "spacing", "crop")]
        before, after = (
            prepare(np.empty((0, *array.shape[1:])), steps, grid)[0].shape[1:]
            for steps in ([s for s in seen if s["step"] != "crop"], seen)
        )
        if before != after:
            what = "%s: the student sees the central %s of %s samples and takes all beyond for background."
            logger.warning(what, image.files[0], after, before)
        is_mask = self.config["kind"] == "segmentation"
        return array, grid, self.mask(array, grid) if is_mask else self.probabilities(array)[0]

    def read(self, image: Input) -> tuple[np.ndarray, Grid | None]:
        """Read a picture (C, H, W), levels 0 to 255, or a volume (C, X, Y, Z) and its grid; else a ValueError."""
        if self.config["dimensions"] == 2:
            return pictures.read_channels(image.files).transpose(2, 0, 1).astype(np.float32), None
        if not image.slices:
            return read_case(image.files, self.channels)
        folder, count = Path(image.files[0]), self.channels
        if count > 1:
            raise ValueError(f"{folder} is one DICOM series, the student takes {count} channels: give NIfTI files.")
        volume, grid = read_series(folder, image.slices)
        return volume[None], grid

    def probabilities(self, image: np.ndarray, grid: Grid | None = None) -> tuple[np.ndarray, list[Inverse]]:
        """Return the answer for an image (C, H, W) with levels 0 to 255, or for a volume (C, D, H, W) on its grid.

        It is (C,) of classes or findings, (C, h, w) or (C, d, h, w) at the network's resolution, with the ways back to
        the image's. A blank image, or one of other channels, is a ValueError.
        """
        array, inverses = prepare(image, self.config["steps"], grid)
        if problem := pictures.level_problem(array):
            raise ValueError(problem)
        is_volume = array.ndim == 4
        batch = np.moveaxis(array, 0, 1) if is_volume else array[None]  # slices are the batch of a volume
        answer = softmax(logits_of(self._run, batch, self.config["batch_size"], self.config.get("window")), 1)
        if self.config["kind"] == "multilabel":
            return answer[0, 1], inverses
        return (np.moveaxis(answer, 0, 1) if is_volume else answer[0]), inverses

    def named(self, probabilities: np.ndarray) -> str:
        """Return the likeliest class, or the findings (C,) of 0.5 and more, joined by "|"."""
        classes = self.config["classes"]
        if self.config["kind"] == "classification":
            return str(classes[int(probabilities.argmax())])
        return "|".join(name for name, p in zip(classes, probabilities, strict=True) if p >= 0.5) or "none"

    def mask(self, image: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Predict the label map (H, W) or (D, H, W), uint8, of an image or a volume at its own resolution."""
        answer, inverses = self.probabilities(image, grid)
        mask, highest = np.zeros(image.shape[1:], np.uint8), np.full(image.shape[1:], -1.0, np.float32)
        for label in range(len(answer)):  # one class at a time: a volume's probabilities are large
            found = answer[label : label + 1]
            for inverse in reversed(inverses):
                found = inverse(found)
            better = found[0] > highest
            mask[better], highest = label, np.where(better, found[0], highest)
        for label in self.config["largest_component"]:
            mask = largest_component(mask, label).astype(np.uint8)
        return mask


def refusals() -> tuple[type[Exception], ...]:
    """What an image or a network that cannot be used raises, ONNX Runtime's own errors included."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
    return ValueError, OSError, MemoryError, *(getattr(state, kind) for kind in (*kinds, "RuntimeException"))


def _predict_one(predictor: Predictor, image: Input, folder: Path, dicom_seg: bool, dicom_captures: bool) -> list[str]:
    """Write the files of one answer; return the row of ``predictions.csv``, empty for masks."""
    (array, grid, answer), classes = predictor.answered(image), predictor.config["classes"]

    def to(end: str) -> Path:
        return names.file_of(folder, f"{image.id}_{end}")

    if grid is not None:
        write_mask_volume(to("mask.nii.gz"), answer, grid)
        levels, series = grey_levels(array[0]), [item.file for item in image.slices]
        if dicom_seg and series:
            write_segmentation(to("mask.dcm"), answer, grid, series, classes)
        if dicom_captures and series:
            write_captures(to("captures"), answer, levels, grid, series, partial(drawn_overlay, classes=classes))
        pictures.write_png(to("overlay.png"), drawn_overlay(*seen_slice(levels, answer, grid), classes))
        return []
    picture = pictured(image, array)
    if answer.ndim == 2:
        pictures.write_mask(to("mask.png"), answer, len(classes))
        pictures.write_png(to("overlay.png"), drawn_overlay(picture, answer, classes))
        return []
    found = predictor.named(answer)
    sure = [f"{name} {p:.2f}" for name, p in zip(classes, answer, strict=True) if name in found.split("|")]
    write_captioned(to("overlay.png"), picture, ", ".join(sure) or found)
    return [image.id, found, *(f"{v:.6f}" for v in answer)]


def pictured(image: Input, array: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3), uint8, that was read as (C, H, W); of several files the first."""
    return (array[[0, 0, 0]] if len(image.files) > 1 else array).transpose(1, 2, 0).astype(np.uint8)


def drawn_overlay(image: np.ndarray, mask: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw an image (H, W, 3) or (H, W), uint8, with its mask (H, W) tinted and outlined, (h, W, 3) uint8.

    A single class has the colour that differs most from the image around it; of several, each has its own, and a legend
    stands below.
    """
    image = near = image if image.ndim == 3 else np.repeat(image[..., None], 3, -1)
    for axis in (0, 1) if mask.any() else ():
        places = np.flatnonzero((mask > 0).any(1 - axis))
        near = near.take(range(max(0, places[0] - 16), min(places[-1] + 16, mask.shape[axis])), axis)
    colours = pictures.contrasting(near) if len(classes) == 2 else pictures.class_colours(range(1, len(classes)))
    opacity = OPACITY * (mask > 0)[..., None]
    picture = (image * (1 - opacity) + colours[mask.astype(int) - 1] * opacity).round().astype(np.uint8)
    picture = pictures.outlined(picture, [(mask == label, colours[label - 1]) for label in np.unique(mask[mask > 0])])
    return picture if len(classes) == 2 else lettered(picture, classes[1:], colours.tolist())


def write_captioned(path: Path, image: np.ndarray, caption: str) -> None:
    """Write an image (H, W, 3), uint8, enlarged if it is narrow, above a line of text."""
    factor = -(-LETTERED_WIDTH // image.shape[1])
    pictures.write_png(path, lettered(image.repeat(factor, 0).repeat(factor, 1), [caption]))


def lettered(image: np.ndarray, texts: Sequence[str], colours: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """Write texts, each fitted to the width and beside its colour if it has one, below an image (H, W, 3), uint8."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = image.shape[:2]
    letters = max(LETTERED_WIDTH, width) / (24 if colours else 16)
    line, indent = round(1.8 * letters), letters * (2 if colours else 0.5)
    picture = Image.new("RGB", (width, height + line * len(texts)))
    picture.paste(Image.fromarray(image))
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(texts):
        top = height + row * line
        room = (width - indent - letters / 2) / ImageFont.load_default(letters).getlength(text)
        if colours:
            draw.rectangle((0, top, line - 3, top + line - 3), tuple(colours[row]))
        font = ImageFont.load_default(max(letters * min(1.0, room), 1))
        draw.text((indent, top + line / 2), text, (255, 255, 255), font, anchor="lm")
    return np.asarray(picture)
