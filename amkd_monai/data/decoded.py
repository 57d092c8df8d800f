"""Items read through a transform chain: decoded to uint8 memory maps, or one by one; bad ones are reported."""

import enum
import functools
import json
import math
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, MetaTensor, list_data_collate
from torch.utils.data import Dataset

from amkd_monai.data.splits import Item
from amkd_monai.data.transforms import CODING, FOREGROUND
from amkd_monai.errors import is_own, root_cause
from amkd_monai.files.masks import IGNORED as UNLABELLED
from amkd_monai.files.masks import coding_problem
from amkd_monai.files.names import DataProblems, files_of, label_files
from amkd_monai.files.pictures import DAMAGED, level_problem
from amkd_monai.storage import atomic_folder, atomic_write_json, content_hashes, exclusive_lock, fingerprint, joint_hash
from amkd_monai.terminal import logger, progress

COMPARED = 200  # images of each kind whose look is compared, evenly spaced
UNLIKE = 2.0  # standard deviations between labelled images by which the mean of the further ones may differ

UNREADABLE = (*DAMAGED, RuntimeError)  # MONAI and torch (out of memory) raise RuntimeError


class BadSampleError(ValueError):
    """A sample that cannot be used, named with the remedy."""


def read_item(item: Mapping[str, Any], transform: Callable) -> dict[str, Any]:
    """Apply a transform chain to an item; files that cannot be used or show nothing are a BadSampleError."""
    if problem := item.get("problem"):
        raise BadSampleError(problem)
    images = files_of(item["image"])
    files, item = [*images, *label_files(item)], {**item, "image": images[0] if len(images) == 1 else images}
    try:
        data = dict(transform(dict(item)))
    except UNREADABLE as error:
        cause = " ".join(str(root := root_cause(error)).split())
        if is_own(root) and any(file in cause for file in files):
            raise BadSampleError(cause) from error
        raise BadSampleError(f"{' or '.join(files)} cannot be read ({cause[:200]}): replace or remove it.") from error
    image = np.asarray(data["image"])
    if not np.isfinite(image).all():
        raise BadSampleError(f"{images[0]} holds values that are not finite: replace or remove the file.")
    if isinstance(data["image"], MetaTensor) and image.ndim == 4:
        _warn_of_crop(data, images[0])
    for problem in filter(None, map(level_problem, [image] if len(images) == 1 and image.ndim < 4 else image)):
        raise BadSampleError(f"{images[0]} cannot be used: {problem}.")
    return data


def _warn_of_crop(data: Mapping[str, Any], file: str) -> None:
    """Say what a crop leaves out: of a labelled volume foreground, of another any part."""
    image, corners = data["image"], getattr(data.get("label"), "meta", {}).pop(FOREGROUND, None)
    is_cut = "label" not in data and any(np.any(op["extra_info"].get("cropped", 0)) for op in image.applied_operations)
    if corners is not None:
        ends, size = np.linalg.solve(np.asarray(image.affine), corners)[:3], np.array(image.shape[1:])
        is_cut = ends.min() < -0.51 or (ends.max(1) > size - 0.49).any()  # half a sample is rounding
    if is_cut:
        what = "part of it" if corners is None else "foreground of its label"
        logger.warning("%s: %s lies beyond the central %s samples that the student sees.", file, what, image.shape[1:])


class Agreement:
    """What all items of a data set share: the meaning of values in files, and ``axes`` of volumes, "" of pictures."""

    def __init__(self) -> None:
        self.axes, self._codings = "", set[str]()

    def check(self, data: Mapping[str, Any], item: Mapping[str, Any]) -> None:
        """Raise BadSampleError if what was read of an item contradicts the items before it."""
        image, axes = data["image"], ""
        if isinstance(image, MetaTensor) and image.ndim == 4:
            axes = "".join(nibabel.aff2axcodes(np.asarray(image.affine)))
        if self.axes not in ("", axes):
            raise BadSampleError(f"{item['image']} lies in the axes {axes}, others in {self.axes}: add Orientationd.")
        read = [getattr(data.get(key), "meta", {}).pop(CODING, ()) for key in ("image", "label")]
        codings = self._codings.union(*read if "label" in item else ())  # what is predicted is read by itself
        if problem := coding_problem(codings):
            of = "image" if coding_problem(self._codings.union(read[0])) else "label"
            raise BadSampleError(f"{item[of]}: {problem}")
        self.axes, self._codings = axes, codings


def _check_on_bad_sample(value: str) -> None:
    if value not in ("stop", "skip"):
        raise ValueError(f"on_bad_sample must be 'stop' or 'skip', not '{value}'.")


def _is_class(label: Any) -> bool:
    return isinstance(label, (int, np.integer)) and not isinstance(label, bool)


def _samples(array: np.ndarray) -> np.ndarray:
    """Samples (N, C, H, W) of one image (C, H, W) or of the slices of a volume (C, D, H, W)."""
    return array[None] if array.ndim == 3 else array.swapaxes(0, 1)


class DecodedDataset(Dataset):
    """A dataset whose files are decoded once by a MONAI transform chain and then read from memory maps.

    Pictures (C, H, W) are one sample each; volumes (C, D, H, W) give D samples, each slice with its two neighbours
    as further channels. Images are stored in 256 steps.

    Args:
        data: datalist items with ``image``, ``id``, ``group`` and, where labelled, ``label``: a path, several paths of
            masks that are combined, or a class.
        transform: deterministic chain to ``image`` in [0, 1] and ``label``, class indices, all of one size (H, W).
        cache_dir: folder for the memory maps; they are found again by content hashes and the chain's description.
        num_classes: labels must be below it.
        on_bad_sample: ``stop`` raises on the first unusable file, ``skip`` leaves it out and lists it in ``skipped``.
        teacher_channels: one or three channels of images that have several, which teachers are shown.
        findings: number F of findings, where a label is the number whose bits they are, the first one lowest.

    Raises:
        BadSampleError: a file cannot be read, or image and label disagree in size, or a label is out of range.
    """

    directory: Path  # the folder ``decoded-<key>`` of the memory maps
    ids: list[str]  # of each sample; slices are ``<case>#<slice>``
    cases: list[str]
    groups: list[str]
    hashes: list[str]
    skipped: list[str]  # ids of files that were left out
    axes: str  # where the axes of volumes point, slices first, such as "RAS"; empty for pictures
    has_label: np.ndarray  # (N,) boolean
    has_foreground: np.ndarray  # (N,) boolean
    first: np.ndarray  # (N,) sample of the first and the last slice of each sample's volume
    last: np.ndarray
    images: np.ndarray  # (N, C, H, W) uint8
    labels: np.ndarray  # masks (N, 1, H, W), classes (N,), or 0 and 1 of findings (N, F); 255 where there is no label
    classes: np.ndarray | None  # (N,) class per image, or number of its findings, -1 where unknown; None for masks
    sliced: bool  # whether samples are slices of volumes
    chain: str  # hash of the transform chain

    def __init__(
        self,
        data: list[Item],
        transform: Callable,
        cache_dir: str | Path,
        num_classes: int = 2,
        on_bad_sample: str = "stop",
        teacher_channels: Sequence[int] = (),
        findings: int = 0,
    ) -> None:
        _check_on_bad_sample(on_bad_sample)
        if not data:
            raise ValueError("The list of images to decode is empty: check dataset_dir and the split.")
        if on_bad_sample == "stop" and (problems := [item["problem"] for item in data if "problem" in item]):
            raise DataProblems(problems)
        self.data, self.num_classes, cache_dir = list(data), 2 if findings else num_classes, Path(cache_dir)
        self.transform, self.on_bad_sample, self.findings = transform, on_bad_sample, findings
        self.classifies = any(_is_class(item.get("label")) for item in self.data)
        paths = [p for i in self.data for p in (*files_of(i["image"]), *label_files(i)) if Path(p).exists()]
        by_path = dict(zip(paths, content_hashes(paths, cache_dir), strict=True))
        hashes = []
        for item in self.data:
            of_item = files_of(item["image"]), label_files(item)
            images, masks = ([by_path.get(file, "missing") for file in files] for files in of_item)
            label = f"class {item['label']}" if _is_class(item.get("label")) else "-".join(masks)
            hashes.append([joint_hash(images), label])
        ids = [[item["id"], item.get("group", item["id"])] for item in self.data]
        description = describe(transform)
        self.chain = fingerprint("decoded-5", description)
        of_labels = [findings] if findings else num_classes
        key = fingerprint("decoded-5", hashes, ids, description, of_labels, on_bad_sample)
        self.directory = cache_dir / f"decoded-{key[:16]}"
        finished = self.directory / "index.json"
        if not finished.is_file():  # a finished folder may lie on a disk that cannot be written
            with exclusive_lock(self.directory.with_suffix(".lock"), wait_s=3600):
                if not finished.is_file():  # nor has another process made it meanwhile
                    self._decode(transform, on_bad_sample, hashes)
        index = json.loads(finished.read_text(encoding="utf-8"))
        for name in ("ids", "cases", "groups", "hashes", "skipped", "axes"):
            setattr(self, name, index[name])
        for name in ("has_label", "has_foreground", "first", "last"):
            setattr(self, name, np.array(index[name]))
        self.images, self.labels = (
            np.memmap(self.directory / f"{name}.u8", np.uint8, "r", shape=(len(self), *index["shapes"][name]))
            for name in ("images", "labels")
        )
        self.sliced, self.teacher_channels = self.ids[0] != self.cases[0], tuple(teacher_channels)
        channels = self.images.shape[1]
        if (self.teacher_channels or channels != (1 if self.sliced else 3)) and (
            len(self.teacher_channels) not in (1, 3) or not set(self.teacher_channels) <= set(range(channels))
        ):
            has = f"The images have {channels} channels, teacher_channels are {list(self.teacher_channels)}"
            raise ValueError(f"{has}: give one or three of 0 to {channels - 1} as teacher_channels.")
        self.classes = None
        if self.classifies:
            number = self.labels.astype(int) @ (1 << np.arange(findings)) if findings else self.labels.astype(int)
            self.classes = np.where(self.has_label, number, -1)

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        """Return the image (C, H, W) uint8 of a sample, RGB or its channels; each of a slice with its neighbours."""
        if not self.sliced:
            return self.images[index]
        found = self.images[self.neighbours(index)]  # (3, C, H, W)
        return found.swapaxes(0, 1).reshape(-1, *found.shape[2:])

    def shown(self, index: int) -> np.ndarray:
        """Return the image (3, H, W) uint8 that teachers see of a sample, see :meth:`view`."""
        image = self.image(index)
        return self.view(image.reshape(-1, 3, *image.shape[1:]) if self.sliced else image)

    def view(self, image: np.ndarray) -> np.ndarray:
        """Return what teachers see (3, H, W) of an image (C, H, W), or of a slice and its neighbours (C, 3, H, W).

        Of ``teacher_channels``, one is shown as a grey picture or as its three slices, three as RGB of the slice.
        """
        chosen = list(self.teacher_channels)
        if not self.sliced:
            return image[chosen * 3 if len(chosen) == 1 else chosen or slice(None)]
        return image[chosen, 1] if len(chosen) == 3 else image[chosen[0] if chosen else 0]

    def neighbours(self, index: int) -> np.ndarray:
        """Return the samples (3,) before, at and after a slice; the ends of a volume are their own neighbours."""
        return np.clip([index - 1, index, index + 1], self.first[index], self.last[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return image (C, H, W), label (1, H, W), () or (F,), uint8 (255 where unlabelled), id, index, has_label."""
        image, label = (torch.from_numpy(np.array(rows)) for rows in (self.image(index), self.labels[index]))
        known = bool(self.has_label[index])
        return {"image": image, "label": label, "id": self.ids[index], "index": index, "has_label": known}

    @functools.cached_property
    def ignores(self) -> dict[str, bool]:
        """Part of the keys of what masks teach or score: empty unless they leave pixels without a label."""
        rows = np.flatnonzero(self.has_label) if self.classes is None else ()
        return {"ignores": True} if any((self.labels[row] == UNLABELLED).any() for row in rows) else {}

    def shown_classes(self) -> np.ndarray:
        """Which classes the label of each sample shows (N, classes); of findings, each present, then each absent."""
        if self.findings:
            return np.concatenate([self.labels == 1, self.labels == 0], 1)
        counts = (np.bincount(label.ravel(), minlength=self.num_classes) for label in self.labels)
        return np.stack([count[: self.num_classes] > 0 for count in counts])

    def frequencies(self, class_balance: float = 0.0) -> np.ndarray:
        """Frequencies (classes,) of the classes of labelled images, (2, F) of absent and present findings.

        They are those of batches with a ``class_balance`` (:class:`~amkd_monai.data.sampling.BatchSampler`). A class
        without an image counts as half a one.
        """
        rows = np.flatnonzero(self.has_label)
        labels = self.labels[rows].astype(int)
        _, number, counts = np.unique(np.asarray(self.classes)[rows], return_inverse=True, return_counts=True)
        weights = counts[number] ** -float(class_balance)
        if self.findings:
            present = weights @ labels / weights.sum()
            found = np.stack([1 - present, present])
        else:
            found = np.bincount(labels, weights, minlength=self.num_classes) / weights.sum()
        found = found.clip(0.5 / len(rows))
        return found / found.sum(0)

    def class_in_words(self, number: int) -> str:
        """Name a column of :meth:`shown_classes`."""
        if not self.findings:
            return f"class {number}"
        return f"finding {number}" if number < self.findings else f"absence of finding {number - self.findings}"

    def _decode(self, transform: Callable, on_bad_sample: str, hashes: list[list[str]]) -> None:
        index: defaultdict[str, list[Any]] = defaultdict(list)
        agreement, skipped, shapes = Agreement(), [], dict[str, tuple[int, ...]]()
        with (
            atomic_folder(self.directory, replace=True) as folder,
            (folder / "images.u8").open("wb") as images,
            (folder / "labels.u8").open("wb") as labels,
        ):
            for item, item_hashes in progress(list(zip(self.data, hashes, strict=True)), desc="decode"):
                try:
                    decoded = read_item(item, transform)
                    agreement.check(decoded, item)
                    image, label = self._decode_item(item, decoded, shapes.get("images", ()))
                except BadSampleError as error:
                    if on_bad_sample == "stop":
                        raise
                    logger.warning("skipped: %s", error)
                    skipped.append(item["id"])
                    continue
                count, name, first = len(image), item["id"], len(index["ids"])
                foreground = ((label > 0) & (label != UNLABELLED)).reshape(count, -1).any(1)
                sliced = np.ndim(decoded["image"]) == 4
                index["ids"] += [f"{name}#{i:03d}" for i in range(count)] if sliced else [name]
                index["cases"] += [name] * count
                index["groups"] += [item.get("group", name)] * count
                index["hashes"] += ["-".join(h[:16] for h in item_hashes)] * count
                index["has_label"] += ["label" in item] * count
                index["has_foreground"] += foreground.tolist()
                index["first"] += [first] * count
                index["last"] += [first + count - 1] * count
                images.write(image.tobytes())
                labels.write(label.tobytes())
                shapes = {"images": image.shape[1:], "labels": label.shape[1:]}
            if not shapes:
                raise BadSampleError("No usable image is left: check dataset_dir.")
            facts = {"skipped": skipped, "axes": agreement.axes, "shapes": shapes}
            atomic_write_json(folder / "index.json", {**index, **facts})

    def _decode_item(
        self, item: dict[str, Any], decoded: dict[str, Any], size: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, C, H, W) and labels (N, 1, H, W) or (N,) of what the chain gave for an item, both uint8."""
        image = _samples(np.asarray(decoded["image"], dtype=np.float32))
        image = np.round(image.clip(0, 1) * 255).astype(np.uint8)
        of_task, given = f"the task has classes 0 to {self.num_classes - 1}", "label" in item
        if size and image.shape[1:] != size:
            own, others = (f"{c} channel(s) of the size {tuple(hw)}" for c, *hw in (image.shape[1:], size))
            raise BadSampleError(f"{item['image']} has {own}, others {others}: give all images the same.")
        if self.classifies:
            label, most = item.get("label", UNLABELLED), 1 << self.findings if self.findings else self.num_classes
            if given and not (_is_class(label) and 0 <= label < most):
                raise BadSampleError(f"{item['image']} has the label {label!r}; {of_task}: correct its label.")
            if self.findings:
                bits = label >> np.arange(self.findings) & 1 if given else np.full(self.findings, UNLABELLED)
                return image, bits[None].astype(np.uint8)
            return image, np.full(len(image), label, np.uint8)
        if not given:
            return image, np.full((len(image), 1, *image.shape[-2:]), UNLABELLED, np.uint8)
        classes = _samples(np.asarray(decoded["label"]))
        if classes.shape != (len(image), 1, *image.shape[-2:]):
            sizes = f"the size {classes.shape[-2:]}, its image {image.shape[-2:]}"
            raise BadSampleError(f"{item['label']} has {sizes} after preprocessing: give the mask of this image.")
        wrong = classes[~np.isin(classes, [*range(self.num_classes), UNLABELLED])]
        if wrong.size:
            raise BadSampleError(f"{item['label']} holds the value {wrong[0]:g}; {of_task}: correct the mask.")
        return image, classes.astype(np.uint8)


class ReadableDataset(Dataset):
    """Items and their transform chain; of an item that cannot be used ``{"id": ..., "reason": ...}``.

    With ``keep``, what the deterministic chain gives is held in memory.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable, keep: bool = False) -> None:
        self.data, self.transform, self.keep = list(data), transform, keep
        self._kept, self._agreement = dict[int, dict[str, Any]](), Agreement()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return what the chain gives, or why it gives nothing."""
        item, result = self.data[index], self._kept.get(index)
        if result is None:
            try:
                result = read_item(item, self.transform)
                self._agreement.check(result, item)
            except BadSampleError as error:
                result = {"id": str(item.get("id", item["image"])), "reason": str(error)}
            if self.keep:
                self._kept[index] = result
        return dict(result)


def _collate(batch: list[dict[str, Any]]) -> Any:
    return batch[0] if "reason" in batch[0] else list_data_collate(batch)


class ReadableLoader(DataLoader):
    """Loads one item at a time and lists those that cannot be used in ``skipped``, see :class:`ReadableDataset`.

    Attached to an engine, it ends the run after the usable items; with ``on_bad_sample`` "stop" it then raises an error
    that names the others.
    """

    def __init__(self, dataset: ReadableDataset, on_bad_sample: str = "stop", **options: Any) -> None:
        _check_on_bad_sample(on_bad_sample)
        super().__init__(dataset, batch_size=1, collate_fn=_collate, **options)
        self.on_bad_sample, self.skipped = on_bad_sample, list[dict[str, str]]()

    def __len__(self) -> int:
        return len(self.sampler) - len(self.skipped)

    def __iter__(self) -> Iterator[Any]:
        """Yield usable batches, each when the next one is known, so that the length is right at the last."""
        self.skipped.clear()
        waiting: list[Any] = []
        for batch in super().__iter__():
            if "reason" in batch:
                logger.warning("left out: %s", batch["reason"])
                self.skipped.append(batch)
                continue
            yield from waiting
            waiting = [batch]
        if not waiting and self.skipped:
            raise BadSampleError(f"No file could be used. {self.skipped[0]['reason']}")
        yield from waiting

    def attach(self, engine: Engine) -> None:
        """Let an engine end after the usable items."""

        @engine.on(Events.GET_BATCH_COMPLETED)
        def shorten(engine: Engine) -> None:
            engine.state.epoch_length = len(self)

        @engine.on(Events.STARTED)
        def complain_last(engine: Engine) -> None:
            if not engine.has_event_handler(self._complain):  # by now all other handlers are there
                engine.add_event_handler(Events.COMPLETED, self._complain)

    def _complain(self, engine: Engine) -> None:
        if self.skipped and self.on_bad_sample == "stop":
            count, reason = f"{len(self.skipped)} of {len(self.sampler)} item(s)", self.skipped[0]["reason"]
            accept = "the results of the others are written; --on_bad_sample skip accepts this"
            raise BadSampleError(f"{count} could not be used ({accept}): {reason}")


PARTS = {
    functools.partial: "func args keywords",
    types.MethodType: "__func__ __self__",
    types.CodeType: "co_code co_names co_consts",
    types.FunctionType: "__module__ __qualname__ __code__ __defaults__ __kwdefaults__ __closure__",
    types.CellType: "cell_contents",
}
"""Attributes that make a function or its parts what it is."""


def describe(value: Any, _above: tuple[int, ...] = ()) -> Any:
    """Return a JSON-able description of a transform: class names and options, recursively, the same in every process.

    Functions are described by module, name, bytecode and what they have captured, arrays by their values; what MONAI's
    transforms change when they are used is left out.
    """
    if value is None or isinstance(value, (int, float, str)):
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    if id(value) in _above or len(_above) > 60:
        return "..."
    inside = functools.partial(describe, _above=(*_above, id(value)))
    if isinstance(value, (np.ndarray, torch.Tensor, np.generic)):
        return inside(np.asarray(value).tolist())
    if isinstance(value, (enum.Enum, torch.dtype, torch.device, np.dtype, Path)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): inside(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((inside(v) for v in value), key=str)
    if isinstance(value, (list, tuple)):
        return [inside(v) for v in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, bytes):
        return value.hex()
    for kind, parts in PARTS.items():
        if isinstance(value, kind):
            return {part: inside(getattr(value, part)) for part in parts.split()}
    used = {"R", "_seed", "_do_transform", "_lazy", "_tracing", "logger"}
    state = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in used}
    name = getattr(value, "__name__", "") if callable(value) else ""  # built-in functions differ by name alone
    return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "name": str(name), **inside(state)}


def look_unlike(dataset: DecodedDataset) -> str:
    """Say whether unlabelled samples look unlike the labelled ones, by grey level and contrast; empty if not."""
    labelled, further = np.flatnonzero(dataset.has_label), np.flatnonzero(~dataset.has_label)
    if not len(further) or len(labelled) < 2:
        return ""
    shown = [of[np.unique(np.linspace(0, len(of) - 1, COMPARED).astype(int))] for of in (labelled, further)]
    for name, figure in (("mean grey level", np.mean), ("contrast", np.std)):
        known, new = (np.array([figure(dataset.images[i]) for i in indices]) for indices in shown)
        if abs(new.mean() - known.mean()) > UNLIKE * max(float(known.std()), 1.0):
            figures = f"their {name} is {new.mean():.0f} of 255, that of the labelled ones {known.mean():.0f}"
            return f"The unlabelled images look unlike the labelled ones: {figures}. Check modality and window."
    return ""
