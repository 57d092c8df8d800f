"""Images and volumes decoded once to uint8 memory maps, read as 2D or 2.5D samples."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from amkd_monai.atomic import atomic_folder, atomic_write_json, exclusive_lock
from amkd_monai.content import content_hashes, fingerprint
from amkd_monai.data.describe import describe
from amkd_monai.data.readable import Agreement, BadSampleError, check_on_bad_sample, read_item
from amkd_monai.files.masks import IGNORED as UNLABELLED
from amkd_monai.files.names import DataProblems, label_files
from amkd_monai.terminal import progress

logger = logging.getLogger("amkd_monai")


def _is_class(label: Any) -> bool:
    """Whether a label is a class index, not the path of a mask."""
    return isinstance(label, (int, np.integer)) and not isinstance(label, bool)


def as_label_maps(labels: np.ndarray, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Pick labels, masks (N, 1, H, W) or classes (N,), as maps (n, 1, H, W); a class is a map of one cell."""
    picked = np.stack([labels[i] for i in indices])
    return picked[:, None, None, None] if picked.ndim == 1 else picked


class _Rows:
    """An ``.npy`` file written row by row: NumPy's header leaves room for the number of rows."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.shape, self.count = file, (), 0

    def append(self, rows: np.ndarray) -> None:
        """Add rows (n, ...) of one shape and type."""
        self.shape, self.count = rows.shape[1:], self.count + len(rows)
        header = {**np.lib.format.header_data_from_array_1_0(rows), "shape": (self.count, *self.shape)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)
        self.file.seek(0, 2)
        self.file.write(np.ascontiguousarray(rows).data)


class DecodedImages(Dataset):
    """What a :class:`DecodedDataset` left in its folder ``decoded-<key>``, read without the original files.

    Attributes:
        ids, cases, groups, hashes: of each sample; slices are ``<case>#<slice>``.
        has_label, has_foreground: boolean arrays over samples.
        labels: class indices, masks (N, 1, H, W) or one class per image (N,); 255 where there is no label.
        axes: where the axes of volumes point, slices first, such as "RAS"; empty for pictures.
        skipped: ids of files that were left out.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index = json.loads((self.directory / "index.json").read_text(encoding="utf-8"))
        self.ids: list[str] = index["ids"]
        self.cases: list[str] = index["cases"]
        self.groups: list[str] = index["groups"]
        self.hashes: list[str] = index["hashes"]
        self.skipped: list[str] = index["skipped"]
        self.axes: str = index["axes"]
        self.has_label, self.has_foreground = (np.array(index[n], bool) for n in ("has_label", "has_foreground"))
        self._first, self._last = (np.array(index[n]) for n in ("first", "last"))
        self.images, self.labels = (np.load(self.directory / f"{n}.npy", mmap_mode="r") for n in ("images", "labels"))

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        """Return the image (3, H, W) uint8 of a sample; slices come with their neighbours as channels."""
        if self.images.shape[1] == 3:
            return self.images[index]
        neighbours = np.clip([index - 1, index, index + 1], self._first[index], self._last[index])
        return self.images[neighbours, 0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return image (3, H, W) and label (1, H, W) or () as uint8 (255 where unlabelled), id, index, has_label."""
        return {
            "image": torch.from_numpy(np.array(self.image(index))),
            "label": torch.from_numpy(np.array(self.labels[index])),
            "id": self.ids[index],
            "index": index,
            "has_label": bool(self.has_label[index]),
        }


class DecodedDataset(DecodedImages):
    """A dataset whose files are decoded once by a MONAI transform chain and then read from memory maps.

    Photographs (3, H, W) are one sample each; volumes (1, D, H, W) give D samples, each slice with its two neighbours
    as channels. Images are stored in 256 steps.

    Args:
        data: datalist items with ``image``, ``id``, ``group`` and, where labelled, ``label``: a path, several paths of
            masks that are combined, or a class.
        transform: deterministic chain that yields ``image`` in [0, 1] and ``label`` with class indices, all samples of
            one size (H, W).
        cache_dir: folder for the memory maps; they are found again by content hashes and the chain's description.
        num_classes: labels must be below it.
        on_bad_sample: ``stop`` raises on the first unusable file, ``skip`` leaves it out and lists it in ``skipped``.

    Attributes:
        classes: (N,) class per image, -1 where unknown; None for masks.
        chain: hash of the transform chain, which makes a sample what it is together with its id and content hash.

    Raises:
        BadSampleError: a file cannot be read, or image and label disagree in size, or a label is out of range.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        transform: Callable,
        cache_dir: str | Path,
        num_classes: int = 2,
        on_bad_sample: str = "stop",
    ) -> None:
        check_on_bad_sample(on_bad_sample)
        if not data:
            raise ValueError("The list of images to decode is empty: check dataset_dir and the split.")
        if on_bad_sample == "stop" and (problems := [item["problem"] for item in data if "problem" in item]):
            raise DataProblems(problems)
        self.data, self.num_classes = list(data), num_classes
        cache_dir = Path(cache_dir)
        self.classifies = any(_is_class(item.get("label")) for item in self.data)
        paths = [path for item in self.data for path in (item["image"], *label_files(item))]
        by_path = dict(zip(paths, content_hashes(paths, cache_dir / "content_hashes.json"), strict=True))
        labels = [
            f"class {item['label']}"
            if _is_class(item.get("label"))
            else "-".join(by_path[f] for f in label_files(item))
            for item in self.data
        ]
        hashes = [[by_path[item["image"]], label] for item, label in zip(self.data, labels, strict=True)]
        ids = [[item["id"], item.get("group", item["id"])] for item in self.data]
        description = describe(transform)
        self.chain = fingerprint("decoded-4", description)
        key = fingerprint("decoded-4", hashes, ids, description, num_classes, on_bad_sample)
        self.directory = cache_dir / f"decoded-{key[:16]}"
        finished = self.directory / "index.json"
        if not finished.is_file():  # a finished folder may lie on a disk that cannot be written
            with exclusive_lock(self.directory.with_suffix(".lock"), wait_s=3600):
                if not finished.is_file():  # nor has another process made it meanwhile
                    self._decode(transform, on_bad_sample, hashes)
        super().__init__(self.directory)
        self.classes = np.where(self.has_label, self.labels.astype(int), -1) if self.classifies else None

    def _decode(self, transform: Callable, on_bad_sample: str, hashes: list[list[str]]) -> None:
        index: defaultdict[str, list[Any]] = defaultdict(list)
        agreement, skipped = Agreement(), []
        with (
            atomic_folder(self.directory, replace=True) as folder,
            (folder / "images.npy").open("wb") as image_file,
            (folder / "labels.npy").open("wb") as label_file,
        ):
            images, labels = _Rows(image_file), _Rows(label_file)
            for item, item_hashes in progress(list(zip(self.data, hashes, strict=True)), desc="decode"):
                try:
                    decoded = read_item(item, transform)
                    agreement.check(decoded, item)
                    image, label = self._decode_item(item, decoded, images.shape[-2:])
                except BadSampleError as error:
                    if on_bad_sample == "stop":
                        raise
                    logger.warning("skipped: %s", error)
                    skipped.append(item["id"])
                    continue
                count, name = len(image), item["id"]
                foreground = ((label > 0) & (label != UNLABELLED)).reshape(count, -1).any(1)
                rows = {
                    "ids": [name] if image.shape[1] == 3 else [f"{name}#{i:03d}" for i in range(count)],
                    "cases": [name] * count,
                    "groups": [item.get("group", name)] * count,
                    "hashes": ["-".join(h[:16] for h in item_hashes)] * count,
                    "has_label": ["label" in item] * count,
                    "has_foreground": foreground.tolist(),
                    "first": [images.count] * count,
                    "last": [images.count + count - 1] * count,
                }
                for key, values in rows.items():
                    index[key] += values
                images.append(image)
                labels.append(label)
            if not images.count:
                raise BadSampleError("No usable image is left: check dataset_dir.")
            atomic_write_json(folder / "index.json", {**index, "skipped": skipped, "axes": agreement.axes})

    def _decode_item(
        self, item: dict[str, Any], decoded: dict[str, Any], size: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 3 or 1, H, W) and labels (N, 1, H, W) or (N,) of what the chain gave for an item, both uint8."""
        image = np.asarray(decoded["image"], dtype=np.float32)
        image = np.round(image.clip(0, 1) * 255).astype(np.uint8)
        image = image[None] if image.ndim == 3 else image.swapaxes(0, 1)  # (1, D, H, W) -> (D, 1, H, W)
        of_task, given = f"the task has classes 0 to {self.num_classes - 1}", "label" in item
        if size and image.shape[-2:] != size:
            raise BadSampleError(
                f"{item['image']} has the size {image.shape[-2:]} after preprocessing, others {size}: make the "
                "preprocessing end in one fixed size."
            )
        if self.classifies:
            label = item.get("label", UNLABELLED)
            if given and not (_is_class(label) and 0 <= label < self.num_classes):
                raise BadSampleError(f"{item['image']} has the label {label!r}; {of_task}: correct its label.")
            return image, np.full(len(image), label, np.uint8)
        if not given:
            return image, np.full((len(image), 1, *image.shape[-2:]), UNLABELLED, np.uint8)
        classes = np.asarray(decoded["label"])
        classes = classes[None] if classes.ndim == 3 else classes.swapaxes(0, 1)
        if classes.shape != (len(image), 1, *image.shape[-2:]):
            raise BadSampleError(
                f"{item['label']} has the size {classes.shape[-2:]}, its image {image.shape[-2:]} after preprocessing: "
                "give the mask of this image."
            )
        wrong = classes[~np.isin(classes, [*range(self.num_classes), UNLABELLED])]
        if wrong.size:
            raise BadSampleError(f"{item['label']} holds the value {wrong[0]:g}; {of_task}: correct the mask.")
        return image, classes.astype(np.uint8)
