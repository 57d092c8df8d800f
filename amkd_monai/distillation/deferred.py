"""What keeps a training step from waiting for the device: faults that are read later, counters kept on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INTERVAL = 50
"""Training steps between two readings of what the device found, and by default between measurements of gradients."""


class Faults:
    """Faults that the device finds: noted in every step without waiting, raised when they are read.

    Every question to the device (``bool``, ``item``, ``tolist``) makes the host wait until all queued work is done.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def note(self, sentence: str, fault: Tensor, value: Tensor | None = None) -> None:
        """Note whether there is a fault (a boolean scalar); ``{}`` in its sentence stands for the integer ``value``."""
        now = torch.stack([fault.long(), fault.long() if value is None else value.long()])
        known = self.found.get(sentence)
        self.found[sentence] = now if known is None else torch.where(known[0] > 0, known, now)

    def read(self) -> None:
        """Forget what was noted, and raise the first fault as a ValueError."""
        found, self.found = self.found, {}
        flags = torch.stack(list(found.values())).tolist() if found else []
        for sentence, (fault, value) in zip(found, flags, strict=True):
            if fault:
                raise ValueError(sentence.replace("{}", str(value)))


class Counter(nn.Module):
    """A module that counts steps in a buffer called ``name``, part of its state, and on the host, where they are read.

    Further arguments go to the next base class.
    """

    def __init__(self, name: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counter, self._steps = name, 0
        self.register_buffer(name, torch.zeros((), dtype=torch.long))

    @property
    def steps(self) -> int:
        """The steps counted so far."""
        if self._steps < 0:
            self._steps = int(self.get_buffer(self._counter))
        return self._steps

    def count_step(self) -> None:
        """Count a step."""
        self._steps = self.steps + 1
        self.get_buffer(self._counter).add_(1)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._steps = -1
