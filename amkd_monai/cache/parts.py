"""Which process computes which shards of a store: they are dealt out by number, so that no process asks another."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from amkd_monai.cache.store import FeatureStore
from amkd_monai.terminal import progress

LOG_INTERVAL_S = 30.0
"""Seconds between lines of progress where the output is not a terminal."""
Compute = Callable[[int, int, Callable[[int], object]], Mapping[str, np.ndarray]]
"""(view, shard, report) -> arrays of that shard; ``report`` is called with each number of images that is done."""


@dataclass(frozen=True)
class Part:
    """One of ``count`` equal parts of the work, counted from 0: shards are dealt out by their number."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"Part {self.index + 1}/{self.count} does not exist: give 1/N to N/N.")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read ``3/8``, the third of eight parts."""
        if not (found := re.fullmatch(r"(\d+)/(\d+)", text)):
            raise ValueError(f"The part '{text}' is not understood: write 3/8 for the third of eight.")
        return cls(int(found[1]) - 1, int(found[2]))

    @classmethod
    def from_environment(cls) -> Part:
        """The part of this process under torchrun (``RANK``, ``WORLD_SIZE``); everything elsewhere."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


EVERYTHING = Part()


def build_missing(
    store: FeatureStore, compute: Compute, part: Part = EVERYTHING, title: str = "", wait_s: float = 3600.0
) -> None:
    """Compute and write the missing shards of a part, with progress, rate and time left.

    A process that builds everything holds the store meanwhile, so that a second one waits and then finds it complete.
    Parts hold nothing: they run side by side, on any machines that share the folder.
    """
    if part.count > 1:
        store.create()
    with store.building(wait_s) if part.count == 1 else nullcontext():
        own, written = store.shards[part.index :: part.count], store.written()
        missing = [at for at in own if at not in written]
        total, left = (sum(len(store.samples_of(shard)) for _, shard in shards) for shards in (own, missing))
        with progress_line(title, total, total - left) as bar:
            for view, shard in missing:
                if store.has(view, shard):  # another process was faster
                    bar.update(len(store.samples_of(shard)))
                else:
                    store.write_shard(view, shard, compute(view, shard, bar.update))
        store.tidy()


def progress_line(title: str, total: int, done: int) -> tqdm:
    """A progress line with rate and time left: live on a terminal, else now and then."""
    interval: dict[str, Any] = {} if os.isatty(2) else {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S}
    return progress(total=total, initial=done, desc=title, unit="image", disable=False, **interval)
