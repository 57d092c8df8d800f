"""Evaluation and inference of folders in which some files cannot be used: these are reported, the rest goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import nibabel
import numpy as np
from ignite.engine import Engine, Events
from monai.data import DataLoader, MetaTensor, list_data_collate
from torch.utils.data import Dataset

from amkd_monai.errors import is_own, root_cause
from amkd_monai.files.masks import coding_problem
from amkd_monai.files.names import label_files
from amkd_monai.files.pictures import DAMAGED, level_problem

logger = logging.getLogger("amkd_monai")

UNREADABLE = (*DAMAGED, RuntimeError)  # MONAI and torch (out of memory) raise RuntimeError


class BadSampleError(ValueError):
    """A sample that cannot be used, named with the remedy."""


class Unusable(NamedTuple):
    """An item that cannot be used, and why in one sentence."""

    id: str
    reason: str


def read_item(item: Mapping[str, Any], transform: Callable) -> dict[str, Any]:
    """Apply a transform chain to an item; files that cannot be used or show nothing are a BadSampleError."""
    if problem := item.get("problem"):
        raise BadSampleError(problem)
    files = [str(item["image"]), *label_files(item)]
    try:
        data = dict(transform(dict(item)))
    except UNREADABLE as error:
        cause = " ".join(str(root := root_cause(error)).split())
        if is_own(root) and any(file in cause for file in files):
            raise BadSampleError(cause) from error
        raise BadSampleError(f"{' or '.join(files)} cannot be read ({cause[:200]}): replace or remove it.") from error
    image = np.asarray(data["image"])
    if not np.isfinite(image).all():
        raise BadSampleError(f"{item['image']} holds values that are not finite: replace or remove the file.")
    if problem := level_problem(image):
        raise BadSampleError(f"{item['image']} cannot be used: {problem}.")
    return data


class Agreement:
    """What all items of a data set share: the meaning of 255 in their masks, and the axes of their volumes.

    Attributes:
        axes: where the axes of volumes (C, X, Y, Z) point after the transforms, such as "RAS"; empty for pictures.
    """

    def __init__(self) -> None:
        self.axes, self._codings = "", set[str]()

    def check(self, data: Mapping[str, Any], item: Mapping[str, Any]) -> None:
        """Raise BadSampleError if what was read of an item contradicts the items before it."""
        image, axes = data["image"], ""
        if isinstance(image, MetaTensor) and image.ndim == 4:
            axes = "".join(nibabel.aff2axcodes(np.asarray(image.affine)))
        if self.axes not in ("", axes):
            raise BadSampleError(
                f"{item['image']} lies in the axes {axes} after preprocessing, others in {self.axes}: add Orientationd "
                "to it."
            )
        codings = self._codings.union(getattr(data.get("label"), "meta", {}).pop("mask_coding", ()))
        if problem := coding_problem(codings):
            raise BadSampleError(f"{item['label']}: {problem}")
        self.axes, self._codings = axes, codings


class ReadableDataset(Dataset):
    """Items and their transform chain; an item that cannot be used is an :class:`Unusable`.

    Items have ``image``, ``id`` and, where labelled, ``label``; with ``keep``, what the deterministic chain gives is
    held in memory.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable, keep: bool = False) -> None:
        self.data, self.transform, self.keep = list(data), transform, keep
        self._kept: dict[int, dict[str, Any] | Unusable] = {}
        self._agreement = Agreement()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any] | Unusable:
        """Return what the chain gives, or why it gives nothing."""
        result = self._kept.get(index) or self._read(self.data[index])
        if self.keep:
            self._kept[index] = result
        return result if isinstance(result, Unusable) else dict(result)

    def _read(self, item: Mapping[str, Any]) -> dict[str, Any] | Unusable:
        try:
            data = read_item(item, self.transform)
            self._agreement.check(data, item)
        except BadSampleError as error:
            return Unusable(str(item.get("id", item["image"])), str(error))
        return data


def _collate(batch: list[Any]) -> Any:
    return batch[0] if isinstance(batch[0], Unusable) else list_data_collate(batch)


class ReadableLoader(DataLoader):
    """Loads one item at a time and passes over those that cannot be used.

    Attach it to the engine that uses it: the run ends after the usable items. With
    ``on_bad_sample`` "stop" it then ends with an error that names the others; with "skip" they are only listed.

    Attributes:
        skipped: ``{"id": ..., "reason": ...}`` of each item that was passed over.
    """

    def __init__(self, dataset: ReadableDataset, on_bad_sample: str = "stop", **options: Any) -> None:
        check_on_bad_sample(on_bad_sample)
        super().__init__(dataset, batch_size=1, collate_fn=_collate, **options)
        self.on_bad_sample = on_bad_sample
        self.skipped: list[dict[str, str]] = []

    def __len__(self) -> int:
        return len(self.sampler) - len(self.skipped)

    def __iter__(self) -> Iterator[Any]:
        """Yield usable batches, each when the next one is known, so that the length is right at the last."""
        self.skipped.clear()
        waiting: list[Any] = []
        for batch in super().__iter__():
            if isinstance(batch, Unusable):
                logger.warning("left out: %s", batch.reason)
                self.skipped.append(batch._asdict())
                continue
            yield from waiting
            waiting = [batch]
        if not waiting and self.skipped:
            raise BadSampleError(f"No file could be used. {self.skipped[0]['reason']}")
        yield from waiting

    def attach(self, engine: Engine) -> None:
        """Let an engine end after the usable items."""

        def shorten(engine: Engine) -> None:
            engine.state.epoch_length = len(self)

        def complain_last(engine: Engine) -> None:
            if not engine.has_event_handler(self._complain):  # by now all other handlers are there
                engine.add_event_handler(Events.COMPLETED, self._complain)

        engine.add_event_handler(Events.GET_BATCH_COMPLETED, shorten)
        engine.add_event_handler(Events.STARTED, complain_last)

    def _complain(self, engine: Engine) -> None:
        if self.skipped and self.on_bad_sample == "stop":
            raise BadSampleError(
                f"{len(self.skipped)} of {len(self.sampler)} item(s) could not be used, the results of the others are "
                f"written: {self.skipped[0]['reason']} (--on_bad_sample skip accepts this.)"
            )


def check_on_bad_sample(value: str) -> None:
    """Refuse another value than "stop" or "skip"."""
    if value not in ("stop", "skip"):
        raise ValueError(f"on_bad_sample must be 'stop' or 'skip', not '{value}'.")
