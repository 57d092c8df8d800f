"""How many images go through a teacher at once: as many as the memory that is free takes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from amkd_monai.memory import give_back_free

logger = logging.getLogger("amkd_monai")

LARGEST = {"cpu": 4, "cuda": 64}
"""Images per call at most. On a CPU larger batches fall out of its caches: EfficientNet-Lite1 takes 32 ms per image in
batches of 4, 51 ms in batches of 8 and 87 ms in batches of 16."""
SHARE = 0.5
"""Part of the free memory that a batch may take."""
SAMPLING_S = 0.002
"""Seconds between two looks at the memory of the process."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def batch_for(available: float, per_image: float, largest: int) -> int:
    """Images per call, 1 to ``largest``, that take at most :data:`SHARE` of the memory.

    Args:
        available: free memory, bytes.
        per_image: what one image takes at its peak, bytes.
        largest: never more images than these.
    """
    return max(1, min(largest, int(SHARE * available / max(per_image, 1.0))))


class Batches:
    """Feeds items to a teacher: one first, to see what it takes, then as many at once as fit.

    Args:
        device: where the teacher runs.
        size: items per call; None to choose it by memory.

    Attributes:
        size: items per call; None before the first one is measured.
    """

    def __init__(self, device: torch.device | str, size: int | None = None) -> None:
        self.device = torch.device(device)
        self.size = size

    def run(
        self, work: Callable[[Sequence[Item]], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Yield batches of the items, in their order, and what the work makes of each.

        Raises:
            torch.OutOfMemoryError: a CUDA device has no room for one item.
        """
        first = 0
        while first < len(items):
            batch = items[first : first + (self.size or 1)]
            try:
                result = work(batch) if self.size else self._measured(work, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.size = len(batch) // 2
                logger.warning("%s has no room for %d images at once: now %d", self.device, len(batch), self.size)
                torch.cuda.empty_cache()
                continue
            first += len(batch)
            yield batch, result

    def _measured(self, work: Callable[[Sequence[Item]], Result], batch: Sequence[Item]) -> Result:
        """Do the work on the first item and choose the size by what it took."""
        on_cuda = self.device.type == "cuda"
        result, taken = (_cuda_rise if on_cuda else _resident_rise)(lambda: work(batch), self.device)
        largest = LARGEST.get(self.device.type, LARGEST["cpu"])
        self.size = batch_for(available_memory(self.device), taken, largest)
        logger.info("one image takes %.0f MB at its peak: %d at once", taken / 1e6, self.size)
        return result


def available_memory(device: torch.device) -> float:
    """Memory, in bytes, that this process may still take on a device; on a CPU its part among torchrun's processes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = min(float(psutil.virtual_memory().available), control_group_room())
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def control_group_room(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left below the memory limit of a container or a batch job (control groups, version 2); inf without one."""
    entries = proc.read_text().splitlines() if proc.is_file() else []
    own = next((entry.removeprefix("0::/") for entry in entries if entry.startswith("0::/")), None)
    if own is None:
        return float("inf")
    room = float("inf")
    for group in (root / own, *(root / own).parents):
        if not group.is_relative_to(root) or not (group / "memory.max").is_file():
            continue
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])  # the rest is cache
            room = min(room, int(limit) - used)
    return max(room, 0.0)


def _cuda_rise(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Do some work; returns its result and by how many bytes the device's allocated memory rose meanwhile."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    return result, float(torch.cuda.max_memory_allocated(device) - before)


def _resident_rise(work: Callable[[], Result], _: torch.device) -> tuple[Result, float]:
    """Do some work; returns its result and by how many bytes the resident memory rose meanwhile.

    The process's own record of its peak is of no use: loading the weights may have taken more before.
    """
    give_back_free()
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(SAMPLING_S):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = work()
    finally:
        highest = max(highest, process.memory_info().rss)
        done.set()
        watcher.join()
    return result, float(highest - before)
