"""Evaluation and inference of folders in which some files cannot be used: these are reported, the rest goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import DataLoader, MetaTensor, list_data_collate
from torch.utils.data import Dataset

from amkd_monai.errors import is_own, root_cause
from amkd_monai.files.masks import coding_problem
from amkd_monai.files.names import label_files
from amkd_monai.files.pictures import DAMAGED, level_problem

logger = logging.getLogger("amkd_monai")

UNREADABLE = (*DAMAGED, RuntimeError)
"""What transforms raise for files that cannot be used; MONAI and torch (out of memory) raise RuntimeError."""


class BadSampleError(ValueError):
    """A sample that cannot be used, named with the remedy."""


@dataclass(frozen=True)
class Unusable:
    """An item that cannot be used: its id, and why in one sentence."""

    id: str
    reason: str


def read_item(item: Mapping[str, Any], transform: Callable) -> dict[str, Any]:
    """Apply a transform chain to an item.

    Raises:
        BadSampleError: its files cannot be read, do not belong together, or show nothing.
    """
    if problem := item.get("problem"):
        raise BadSampleError(problem)
    files = " or ".join((str(item["image"]), *label_files(item)))
    try:
        data = dict(transform(dict(item)))
    except UNREADABLE as error:
        cause = " ".join(str(root := root_cause(error)).split())
        if is_own(root) and any(file in cause for file in files.split(" or ")):
            raise BadSampleError(cause) from error
        raise BadSampleError(f"{files} cannot be read ({cause[:200]}): replace or remove the file.") from error
    image = np.asarray(data["image"])
    if not np.isfinite(image).all():
        raise BadSampleError(f"{item['image']} holds values that are not finite: replace or remove the file.")
    if problem := level_problem(image):
        raise BadSampleError(f"{item['image']} cannot be used: {problem}.")
    return data


def stored_axes(image: Any) -> str:
    """Where the axes of a volume (C, X, Y, Z) point after its transforms, such as "RAS"; empty for pictures."""
    import nibabel

    if not isinstance(image, MetaTensor) or image.ndim != 4:
        return ""
    return "".join(nibabel.aff2axcodes(np.asarray(image.affine)))


def check_axes(axes: str, expected: str, file: str) -> None:
    """Refuse volumes whose slices run through the body in different directions.

    Raises:
        BadSampleError: the axes differ.
    """
    if expected and axes != expected:
        raise BadSampleError(
            f"{file} lies in the axes {axes} after preprocessing, others in {expected}: add Orientationd to it."
        )


def joined_codings(known: set[str], data: Mapping[str, Any], item: Mapping[str, Any]) -> set[str]:
    """Codings of the masks so far and of a new one, see :func:`amkd_monai.files.masks.coding_problem`.

    Raises:
        BadSampleError: the new one contradicts them.
    """
    joined = known.union(getattr(data.get("label"), "meta", {}).pop("mask_coding", ()))
    if problem := coding_problem(joined):
        raise BadSampleError(f"{item['label']}: {problem}")
    return joined


class ReadableDataset(Dataset):
    """Items and their transform chain; an item that cannot be used is an :class:`Unusable`.

    Args:
        data: items with ``image``, ``id`` and, where labelled, ``label``.
        transform: deterministic chain.
        keep: hold what the chain gives in memory after the first time.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable, keep: bool = False) -> None:
        self.data, self.transform, self.keep = list(data), transform, keep
        self._kept: dict[int, dict[str, Any] | Unusable] = {}
        self._codings: set[str] = set()
        self._axes = ""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any] | Unusable:
        """Return what the chain gives, or why it gives nothing."""
        if index in self._kept:
            found = self._kept[index]
            return found if isinstance(found, Unusable) else dict(found)
        item = self.data[index]
        result: dict[str, Any] | Unusable
        try:
            result = read_item(item, self.transform)
            check_axes(axes := stored_axes(result["image"]), self._axes, item["image"])
            self._axes = axes
            self._codings = joined_codings(self._codings, result, item)
        except BadSampleError as error:
            result = Unusable(str(item.get("id", item["image"])), str(error))
        if self.keep:
            self._kept[index] = result
        return result if isinstance(result, Unusable) else dict(result)


def _collate(batch: list[Any]) -> Any:
    return batch[0] if isinstance(batch[0], Unusable) else list_data_collate(batch)


class ReadableLoader(DataLoader):
    """Loads one item at a time and passes over those that cannot be used.

    Attach it to the engine that uses it: the run ends after the usable items. With
    ``on_bad_sample`` "stop" it then ends with an error that names the others; with "skip" they are only listed.

    Args:
        dataset: a :class:`ReadableDataset`.
        on_bad_sample: "stop" or "skip".
        options: of MONAI's ``DataLoader``, such as ``num_workers`` or ``sampler``.

    Attributes:
        skipped: ``{"id": ..., "reason": ...}`` of each item that was passed over.
    """

    def __init__(self, dataset: ReadableDataset, on_bad_sample: str = "stop", **options: Any) -> None:
        if on_bad_sample not in ("stop", "skip"):
            raise ValueError(f"on_bad_sample must be 'stop' or 'skip', not '{on_bad_sample}'.")
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
                self.skipped.append({"id": batch.id, "reason": batch.reason})
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
