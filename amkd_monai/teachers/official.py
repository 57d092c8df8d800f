"""Official weight files of the foundation teachers: found, safely read, recognised."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from amkd_monai.checkpoints.find import find_weights, weights_folders
from amkd_monai.checkpoints.signatures import recognise
from amkd_monai.teachers.catalogue import entry
from amkd_monai.weights import CheckpointError, load_state_dict


@dataclass(frozen=True)
class OfficialWeights:
    """The flat state dict of a weight file, and the file."""

    state: dict[str, Tensor]
    path: Path

    def shape(self, key: str, axes: int, layout: str) -> tuple[int, ...]:
        """Return the shape of a tensor from which the network's size is taken.

        Args:
            key: its name.
            axes: how many it must have.
            layout: what they are, for the sentence that refuses others.

        Raises:
            CheckpointError: it has another number of axes, or an empty one.
        """
        shape = tuple(self.state[key].shape)
        if len(shape) != axes or 0 in shape:
            raise self.misshapen(key, layout)
        return shape

    def misshapen(self, key: str, layout: str) -> CheckpointError:
        """Return the error for a tensor of a shape that no file of its teacher has."""
        found = "x".join(map(str, self.state[key].shape)) or "a single number"
        return CheckpointError(f"{self.path} holds '{key}' as {found}, not {layout}: give the authors' own file.")


def locate(key: str, weights: str | Path | None) -> Path:
    """Return the weight file of a teacher.

    Args:
        key: the teacher's key in the catalogue.
        weights: its path, a folder that holds it, or None to search the weights folders and the Hugging Face cache.

    Raises:
        CheckpointError: there is no such file.
    """
    teacher = entry(key)
    if weights is not None and not os.path.isdir(weights):  # noqa: PTH112 - never raises; reading says what is wrong
        return Path(weights)
    found = find_weights(teacher.files, weights, teacher.hub, teacher.hub_files)
    if found is None:
        folders = ", ".join(map(str, weights_folders(weights)))
        fetching = f" or run `python -m amkd_monai fetch {key}`" if teacher.hub else ""
        raise CheckpointError(
            f"The weights of {teacher.name} ({' or '.join(teacher.files)}) are not in {folders} nor in the "
            f"Hugging Face cache: get them ({teacher.source}) and name the file as `weights`{fetching}."
        )
    return found


def read_official(
    key: str, weights: str | Path | None, wanted: str, accepted: Collection[str]
) -> OfficialWeights | None:
    """Find and read a teacher's weights; None for ``random``.

    Args:
        key: the teacher's key in the catalogue.
        weights: a file, a folder, None to search for it, or ``random``.
        wanted: what is needed, for the sentence that refuses another file.
        accepted: signatures that will do (``amkd_monai.checkpoints.signatures``).

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    if str(weights) == "random":
        return None
    path = locate(key, weights)
    state = load_state_dict(path)
    found = recognise(state)
    if found is not None and found not in accepted:  # what nothing recognises is left to the key check
        raise CheckpointError(f"{path} looks like {found}, but {wanted} is needed: give that file.")
    return OfficialWeights(state, path)


@contextlib.contextmanager
def fixed_initialisation(seed: int = 0) -> Iterator[None]:
    """Build a network with the same random weights each time, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
