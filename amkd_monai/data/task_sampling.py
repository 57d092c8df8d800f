"""Which tasks take part in a step: a pure function of seed and epoch, so that a resumed run draws the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from amkd_monai.data.sampling import BatchSampler

PASSES = 1_000
"""A task's data are gone through at most so often in one epoch; keeps the seeds of epochs and passes apart."""


class MultiTaskLoader:
    """Steps of several tasks: each step holds one batch of every task that it drew, ``{task: batch}``.

    Tasks are drawn without replacement, with probabilities that follow N^alpha for N training samples; alpha 1 draws
    them as often as they have samples, 0 equally often.

    Args:
        loaders: {task: loader over a :class:`BatchSampler`}.
        alpha: exponent, 0 to 1.
        tasks_per_step: tasks in a step, at most as many as there are; None takes all of them.
        steps: steps of an epoch; None takes as many as all samples fill.
        seed: seed of the run.

    Raises:
        ValueError: an exponent or a number out of range.
    """

    def __init__(
        self,
        loaders: Mapping[str, DataLoader],
        alpha: float = 0.5,
        tasks_per_step: int | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> None:
        self.loaders, self.seed, self.epoch = dict(loaders), seed, 0
        self.per_step = len(loaders) if tasks_per_step is None else min(int(tasks_per_step), len(loaders))
        if not 0 <= alpha <= 1:
            raise ValueError(f"sampling_alpha is {alpha}: give 0 (all tasks equally often) to 1 (as their samples).")
        if self.per_step < 1:
            raise ValueError(f"tasks_per_step is {tasks_per_step}: give at least 1.")
        sizes = np.array([float(len(loader.dataset)) for loader in loaders.values()]) ** alpha
        self.probabilities = sizes / sizes.sum()
        self.steps = steps or math.ceil(sum(len(loader) for loader in loaders.values()) / self.per_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose steps the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def plan(self) -> list[list[str]]:
        """Return the tasks of every step of the epoch, in the order of the run's tasks."""
        rng, names = np.random.default_rng([self.seed, self.epoch]), list(self.loaders)
        drawn = [
            rng.choice(len(names), size=self.per_step, replace=False, p=self.probabilities) for _ in range(self.steps)
        ]
        return [[names[i] for i in sorted(step)] for step in drawn]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        streams = {task: self._stream(loader) for task, loader in self.loaders.items()}
        for tasks in self.plan():
            yield {task: next(streams[task]) for task in tasks}

    def _stream(self, loader: DataLoader) -> Iterator[Any]:
        """Batches of one task, pass after pass over its data, each pass in an order of its own."""
        sampler = loader.batch_sampler
        for number in range(PASSES):
            if isinstance(sampler, BatchSampler):
                sampler.set_epoch(self.epoch * PASSES + number)
            yield from loader
