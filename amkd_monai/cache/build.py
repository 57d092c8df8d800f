"""Run a frozen teacher once over a dataset and keep its outputs: views, shards, batches."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from amkd_monai.cache import store as stores
from amkd_monai.cache.store import EVERYTHING, NAME, ArraySpec, FeatureStore, Part, StoreError
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.frames import FinerImages
from amkd_monai.data.sampling import warp
from amkd_monai.errors import check_number
from amkd_monai.memory import own_peak
from amkd_monai.storage import fingerprint
from amkd_monai.teachers.base import Teacher, TeacherFacts, build_teacher
from amkd_monai.teachers.plan import KnownTeacher

logger = logging.getLogger("amkd_monai")

MATRIX = "view"  # the stored array with the matrices (2, 3) of a store of several views
SMALLEST_CROP = 0.7  # side of a random crop, as a part of the image's side
LARGEST_ROTATION = 0.26  # of a random crop, radians: 15 degrees
SHARD_SIZE = 128
DTYPES = ("float16", "int8")
BATCH_SIZE = {"cpu": 4, "cuda": 64}
"""Images per forward by device. On a CPU larger batches fall out of its caches: EfficientNet-Lite1 takes 32 ms per
image in batches of 4, 51 ms in batches of 8 and 87 ms in batches of 16."""
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
"""Texts of plain errors of torch's CPU allocator, of the CUDA runtime, and of cuBLAS and cuDNN."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def view_set(views: int) -> list[dict[str, Any]]:
    """Describe so many views, at least 1: identity, horizontal flip, then random resized crops with mild rotation."""
    check_number("views", views, 1, whole=True)
    crop: dict[str, Any] = {"view": "crop", "smallest": SMALLEST_CROP, "rotation": LARGEST_ROTATION}
    crops = [{**crop, "number": number} for number in range(2, views)]
    return [*({"view": name} for name in ("identity", "horizontal_flip")), *crops][:views]


def view_matrix(parameters: Mapping[str, Any], sample_id: str, content_hash: str, size: tuple[int, int]) -> np.ndarray:
    """Affine matrix (2, 3) float32 of one view of a sample, in the normalised coordinates of ``affine_grid``.

    ``parameters`` are one entry of :func:`view_set`, ``size`` is (H, W) of the image.
    """
    side, angle, flip, shift = 1.0, 0.0, parameters["view"] == "horizontal_flip", np.zeros(2)
    if parameters["view"] == "crop":
        name = json.dumps([dict(parameters), sample_id, content_hash], sort_keys=True)
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        side, angle = rng.uniform(parameters["smallest"], 1), rng.uniform(-1, 1) * parameters["rotation"]
        flip, shift = rng.random() < 0.5, rng.uniform(side - 1, 1 - side, size=2)
    (height, width), mirror = size, -1.0 if flip else 1.0
    cos, sin = side * np.cos(angle), side * np.sin(angle)
    rows = [[cos * mirror, -sin * height / width, shift[0]], [sin * mirror * width / height, cos, shift[1]]]
    return np.asarray(rows, np.float32)


def to_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy an array to a device; to a GPU by pinned memory, so that the host does not wait for its queue."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if "cuda" in str(device) else tensor.to(device)


def images_of(dataset: DecodedDataset, indices: Sequence[int], device: torch.device | str) -> Tensor:
    """Stack the student's images (B, C, H, W) in [0, 1]."""
    return to_device(np.stack([dataset.image(i) for i in indices]), device).float() / 255


def ask(
    teacher: Teacher,
    dataset: DecodedDataset,
    indices: Sequence[int],
    device: torch.device | str,
    matrices: np.ndarray | None = None,
    image: Callable[[int], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Run a teacher, on ``device``, on B images, or on views of them by matrices (B, 2, 3).

    ``image`` gives the image (3, H', W') uint8 of a sample in place of the data set's, of which only labels are taken.
    Returns ``grid``, ``pooled`` and ``logits``, as far as the teacher gives them, each (B, ...).
    """
    images = [(image or dataset.shown)(i) for i in indices]
    alike = len({shown.shape for shown in images}) == 1
    parts = [range(len(images))] if alike else [range(k, k + 1) for k in range(len(images))]
    outputs = []
    for part in parts:
        inputs = [to_device(np.stack([images[k] for k in part]), device).float() / 255]
        if teacher.uses_labels:
            inputs.append(to_device(np.stack([dataset.labels[indices[k]] for k in part]), device))
        if matrices is not None:
            theta = to_device(matrices[part.start : part.stop], device)
            inputs[0] = warp(inputs[0], theta)
            if inputs[-1].dtype == torch.uint8 and inputs[-1].ndim == 4:  # the class of an image has no geometry
                inputs[-1] = warp(inputs[-1].float(), theta, mode="nearest").round().byte()
        with torch.inference_mode():
            output = teacher(*inputs)
        found = {name: getattr(output, name) for name in ("grid", "pooled", "logits")}
        outputs.append({name: value.float().cpu().numpy() for name, value in found.items() if value is not None})
    return {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}


class Batches:
    """Splits items into batches for a teacher, and halves the batches for good when memory runs out.

    ``size`` counts items per call; None is :data:`BATCH_SIZE` of the device after a first call with one item. (The last
    bits of features depend on how images are batched: this is how recorded runs batched them.)
    """

    def __init__(self, size: int | None = None, device: torch.device | str = "cpu") -> None:
        default = BATCH_SIZE.get(torch.device(device).type, BATCH_SIZE["cpu"])
        self.size, self._next = (default, 1) if size is None else (size, size)
        check_number("teacher_batch_size", self.size, 1, whole=True)

    def run(
        self, work: Callable[[Sequence[Item]], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Yield batches of the items, in their order, and the result of the work on each."""
        first = 0
        while first < len(items):
            batch = items[first : first + self._next]
            try:
                result = work(batch)
            except (RuntimeError, MemoryError) as error:
                known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
                if len(batch) == 1 or not (known or any(text in str(error) for text in _OUT_OF_MEMORY)):
                    raise
                self.size = self._next = len(batch) // 2
            else:
                first, self._next = first + len(batch), self.size
                yield batch, result
                continue
            # Here, not above: as long as the error is handled its traceback holds the tensors of the batch.
            logger.warning("out of memory with %d images at once: continuing with %d", len(batch), self.size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def cache_teacher(
    teacher: Teacher | KnownTeacher,
    dataset: DecodedDataset,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    views: int = 1,
    dtype: str = "float16",
    part: Part = EVERYTHING,
    description: Mapping[str, Any] | None = None,
) -> FeatureStore:
    """Return the store of a teacher's outputs over a dataset, computing only what is still missing.

    Samples are copied from existing stores of the same teacher and preprocessing where these have them. A complete
    store does not run the teacher at all, nor build a known one. A teacher of a larger input than the images is shown
    their files (:class:`~amkd_monai.data.frames.FinerImages`).

    Args:
        teacher: frozen teacher, built or known; an output that is not finite is a ValueError that names the sample.
        dataset: decoded images; sample i of the store is sample i of the dataset.
        cache_dir: folder of the stores; something else in the store's folder is a StoreError.
        device: where the teacher runs.
        batch_size: images per forward, see :class:`Batches`.
        views: stored views of every image (:func:`view_set`).
        dtype: of feature maps, ``float16``, or ``int8`` with a scale per image and channel; the rest is float16.
        part: what this process computes; with several parts the store may be incomplete on return.
        description: from which the teacher was built; kept with the store, so that it can be verified.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`cache_dtype` is '{dtype}': use one of {', '.join(DTYPES)}.")
    chosen, size = view_set(views), list(dataset.images.shape[-2:])
    facts = teacher.facts()
    finer, asked_at = shown_to(facts, dataset)
    about: dict[str, Any] = {"teacher": facts.fingerprint, "preprocessing": facts.preprocessing, "size": size}
    about |= {"asked_at": asked_at} if finer is not None else {}
    about |= {"dtype": dtype} if dtype != "float16" else {}
    about |= {"channels": list(dataset.teacher_channels)} if dataset.teacher_channels else {}
    key = {**about, "views": ["identity", *chosen[1:]], **_list_key(dataset)}
    directory = stores.store_directory(cache_dir, facts.name, key)
    sample_key = fingerprint({**about, "chain": dataset.chain})
    run = _TeacherRun(teacher, dataset, finer, device, Batches(batch_size, device), directory, sample_key)
    if (directory / NAME).is_file():
        arrays = FeatureStore.open(directory).arrays
    else:
        arrays = {**run.arrays(dtype), **_matrices(views)}
    origin = {"sample_key": sample_key, "teacher": json.loads(json.dumps(description, default=str))}
    lists = key, dataset.ids, dataset.hashes, arrays, views, SHARD_SIZE
    store = FeatureStore.create_or_open(directory, *lists, view_parameters=chosen, origin=origin)
    if not store.is_complete:
        if "because" in asked_at:
            logger.warning("teacher %s sees %d x %d of %d pixels: %s", facts.name, *size, *list(asked_at.values())[2:])
        stores.build_missing(store, partial(run.shard, store), part, f"teacher {facts.name}")
        logger.info(
            "teacher %s ran on %d images, %d at once; peak memory of the process so far %.0f MB",
            *(facts.name, run.images, run.batches.size, own_peak()),
        )
    return store


def shown_to(facts: TeacherFacts, dataset: DecodedDataset) -> tuple[FinerImages | None, dict[str, Any]]:
    """Return the finer images that a teacher is shown, None where it is the decoded ones, and their size for records.

    The record says ``because`` where a preprocessing that is not understood prevents finer images.
    """
    size = list(dataset.images.shape[-2:])
    if facts.side is None or facts.side <= min(size):
        return None, {"images": "decoded", "size": size}
    try:
        finer = FinerImages(dataset, facts.side)
    except ValueError as error:
        return None, {"images": "decoded", "size": size, "wanted": facts.side, "because": str(error)}
    return finer, {"images": "files", "size": list(finer.size)}


def _list_key(dataset: DecodedDataset) -> dict[str, str]:
    """The part of a store's key that names its list of images; the folder covers the transform chain, hashes don't."""
    return {"samples": fingerprint(dataset.ids, dataset.hashes), "decoded": dataset.directory.name}


@dataclass
class _TeacherRun:
    """A teacher and the images it runs on; ``images`` counts them.

    ``directory`` is the folder of the new store, ``sample_key`` the hash of all that an array of one view of one sample
    depends on besides its id and content hash.
    """

    teacher: Teacher | KnownTeacher
    dataset: DecodedDataset
    finer: FinerImages | None
    device: torch.device | str
    batches: Batches
    directory: Path
    sample_key: str
    images: int = 0
    _first: dict[str, np.ndarray] | None = None

    @cached_property
    def earlier(self) -> list[tuple[FeatureStore, dict[tuple[str, str], int]]]:
        """Existing stores with the same ``sample_key``, and the index of each sample (id, hash) in them."""
        found, name = [], self.directory.name.rpartition("-")[0]
        for folder in sorted(file.parent for file in self.directory.parent.glob(f"*/{NAME}")):
            if folder != self.directory and folder.name.rpartition("-")[0] == name:
                try:
                    store = FeatureStore.open(folder)
                except StoreError as error:
                    logger.warning("no earlier store can be reused: %s", error)
                    continue
                if store.origin.get("sample_key") == self.sample_key:
                    samples = zip(store.sample_ids, store.content_hashes, strict=True)
                    found.append((store, {sample: index for index, sample in enumerate(samples)}))
        return found

    def arrays(self, dtype: str) -> dict[str, ArraySpec]:
        """The arrays of an earlier store, or of the first image, whose outputs are kept: no image is run on twice."""
        if self.earlier:
            return {name: spec for name, spec in self.earlier[0][0].arrays.items() if name != MATRIX}
        ((_, self._first),) = self.outputs([0])
        kept: dict[str, Any] = {"grid": dtype}
        return {name: ArraySpec(value.shape[1:], kept.get(name, "float16")) for name, value in self._first.items()}

    def outputs(
        self, indices: Sequence[int], matrices: Mapping[int, np.ndarray] | None = None
    ) -> Iterator[tuple[Sequence[int], dict[str, np.ndarray]]]:
        """Yield B samples at a time and the outputs for them, arrays (B, ...); matrices (2, 3) make views."""

        def work(batch: Sequence[int]) -> dict[str, np.ndarray]:
            views = None if matrices is None else np.stack([matrices[i] for i in batch])
            image = None if self.finer is None else self.finer.image
            found = ask(self.teacher.ready(), self.dataset, batch, self.device, views, image)
            self.images += len(batch)
            return found

        if matrices is None and self._first is not None and 0 in indices:
            yield [0], self._first
            indices = [i for i in indices if i != 0]
        if indices:
            self.teacher.ready().to(self.device)
        yield from self.batches.run(work, indices)

    def copied(self, parameters: Any, sample: tuple[str, str], names: list[str]) -> dict[str, np.ndarray] | None:
        """Arrays (1, *shape) of one view of a sample (id, hash) from an earlier store that holds them undamaged."""
        for store, index_of in self.earlier:
            if sample in index_of and parameters in store.view_parameters:
                index, view = index_of[sample], store.view_parameters.index(parameters)
                try:
                    if store.path(view, index // store.shard_size).is_file():
                        return {name: store.read(name, [index], view) for name in names}
                except StoreError as error:
                    logger.warning("it is not reused: %s", error)
        return None

    def shard(
        self, store: FeatureStore, view: int, shard: int, report: Callable[[int], object]
    ) -> dict[str, np.ndarray]:
        """Copy or compute the arrays of one shard."""
        dataset, samples, parameters = self.dataset, store.samples_of(shard), store.view_parameters[view]
        names = [name for name in store.arrays if name != MATRIX]
        size, of = dataset.images.shape[-2:], {i: (dataset.ids[i], dataset.hashes[i]) for i in samples}
        matrices = {i: view_matrix(parameters, *sample, size) for i, sample in of.items()}
        known = {i: self.copied(parameters, sample, names) for i, sample in of.items()}
        rows = {i: arrays for i, arrays in known.items() if arrays is not None}
        report(len(rows))
        missing = [i for i in samples if i not in rows]
        for batch, found in self.outputs(missing, matrices if view else None):
            rows |= {i: {name: found[name][k : k + 1] for name in names} for k, i in enumerate(batch)}
            report(len(batch))
        values = {name: np.concatenate([rows[i][name] for i in samples]) for name in names}
        return {**values, MATRIX: np.stack(list(matrices.values()))} if MATRIX in store.arrays else values


def answers_store(
    name: str,
    key: Mapping[str, Any],
    dataset: DecodedDataset,
    size: tuple[int, int],
    cache_dir: str | Path,
    views: int = 1,
) -> FeatureStore:
    """Open the store of answers (N, classes, h, w) of probes and cross-fitted networks to views of a dataset."""
    key = {**key, "size": size, **({"views": views} if views > 1 else {}), **_list_key(dataset)}
    arrays = {"logits": ArraySpec((dataset.num_classes, *size), "float16"), **_matrices(views)}
    lists = key, dataset.ids, dataset.hashes, arrays, views, SHARD_SIZE
    directory = stores.store_directory(cache_dir, f"{name}-answers", key)
    return FeatureStore.create_or_open(directory, *lists, view_parameters=view_set(views) if views > 1 else None)


def _matrices(views: int) -> dict[str, ArraySpec]:
    return {MATRIX: ArraySpec((2, 3), "float32")} if views > 1 else {}


def keep_answers(store: FeatureStore, logits: np.ndarray) -> None:
    """Write answers (N, classes, h, w) to a whole dataset into their store; what is there already stays."""
    with store.building(wait_s=600):
        for view, shard in store.missing():
            store.write_shard(view, shard, {"logits": logits[np.asarray(store.samples_of(shard))]})


def verify_store(store: FeatureStore, weights_dir: str | None = None) -> tuple[list[str], str]:
    """Compare all hashes of a store, and its teacher as its files are now: what is wrong, and what was compared."""
    faults = [f"{fault}: delete it to compute it anew" for fault in store.verify().values()]
    if (description := store.origin.get("teacher")) is None:
        return faults, "checksums alone: how its teacher is built is not recorded"
    try:
        teacher = build_teacher(description, weights_dir)
    except (ValueError, RuntimeError, OSError) as error:
        return faults, f"checksums alone: its teacher cannot be built here ({error})"
    if teacher.fingerprint != store.key["teacher"]:
        faults.append("stale: the weights or the preprocessing of its teacher changed since")
    return faults, "checksums, and the fingerprint of its teacher"
