"""A student starts from a trained shared student: from all of it or from a part."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from amkd_monai.networks.shared_student import Head, SharedStudent
from amkd_monai.weights import CheckpointError, load_state_dict, load_strict

logger = logging.getLogger("amkd_monai")

PARTS = {"all": ("",), "known": ("",), "body": ("encoder.", "neck."), "encoder": ("encoder.",)}
"""{part: prefixes of its keys}."""


def initialised(student: nn.Module, path: str | Path | None, task: str | None = None, parts: str = "all") -> nn.Module:
    """Load what a checkpoint of a shared student holds into a student, and return it.

    Args:
        student: a :class:`SharedStudent`, or the student of one task.
        path: flat state dict of a shared student; None leaves the student as it is.
        task: whose head (and batch norms) the student of one task takes.
        parts: ``all``: encoder, neck and heads, which must be the same on both sides; ``known``: encoder, neck and the
            heads that both have, so that a new task joins (shared students only); ``body``: encoder and neck;
            ``encoder``: that alone.

    Raises:
        ValueError: unknown parts.
        CheckpointError: no such file, other heads, or tensors of another shape.
    """
    if path is None:
        if parts != "all":
            raise ValueError(f"init_parts is '{parts}', but there is no init_from to take it from: give both.")
        return student
    if parts not in PARTS:
        raise ValueError(f"init_parts is '{parts}': use one of {', '.join(PARTS)}.")
    state = load_state_dict(path)
    there = heads_of(state)
    if not there:
        raise CheckpointError(f"{path} is not the checkpoint of a shared student: it has no heads; give another file.")
    whole, wanted = (
        parts in ("all", "known"),
        list(student.specs) if isinstance(student, SharedStudent) else [str(task)],
    )
    missing = [t for t in wanted if t not in there]
    surplus = [t for t in there if t not in wanted]
    if not isinstance(student, SharedStudent):
        if whole and missing:
            raise CheckpointError(
                f"{path} has no head for '{task}' (missing: {task}; surplus: {', '.join(surplus)}): give a checkpoint "
                "that was trained on it, or take the encoder alone with init_parts 'encoder'."
            )
        state = _read_by(student, state_of_task(state, task or ""))
    elif whole and (surplus or (missing and parts == "all")):
        raise CheckpointError(
            f"{path} has other heads than this run (missing: {', '.join(missing) or 'none'}; surplus: "
            f"{', '.join(surplus) or 'none'}): choose its tasks, let new ones join with init_parts 'known', or take "
            "the encoder alone with init_parts 'encoder'."
        )
    elif parts == "known":
        if missing:
            logger.warning("heads that start afresh, beyond %s: %s", path, ", ".join(missing))
        new_level = ("neck.",)  # a new head may read a level that no head has read yet
        fresh = {k: v for k, v in student.state_dict().items() if _task_in(k) in missing or k.startswith(new_level)}
        state = {**fresh, **state}
    if not whole:
        taken = {k: v for k, v in state.items() if _task_in(k) is None and k.startswith(PARTS[parts])}
        state = {**{k: v for k, v in student.state_dict().items() if not k.startswith(PARTS[parts])}, **taken}
    load_strict(student, state, path)
    logger.info("the student starts from %s (%s)", path, parts)
    return student


def takes_part_of(student: nn.Module, task: str) -> nn.Module:
    """Let the student of one task load a shared student's state dict too: its ``load_state_dict`` takes its part of it.

    So stock commands that load ``models/model.pt`` into ``network_def``, such as ``ckpt_export``, do on it too. The
    state dict of one task's student loads as before; one without a head for the task is a CheckpointError.
    """

    def take(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        there = heads_of(state)
        if prefix or not there:
            return
        if task not in there:
            raise CheckpointError(f"The checkpoint has no head for '{task}' (it has {', '.join(there)}): set task.")
        part = _read_by(module, state_of_task(state, task))
        state.clear()
        state.update(part)

    student.register_load_state_dict_pre_hook(take)
    return student


def heads_of(state: Mapping[str, Tensor]) -> dict[str, Head]:
    """Return the heads that the state dict of a shared student holds; none for another network's.

    The strides of its heads are not in a state dict: all get the stride of the finest level of its neck.
    """
    stride = 2 if "neck.lateral.4.weight" in state else 4
    weights = {k.split(".")[1]: v for k, v in state.items() if k.startswith("heads.") and k.endswith(".weight")}
    kinds = {4: "segmentation", 2: "classification"}  # another network's heads may have other shapes
    return {task: Head(kinds[w.ndim], w.shape[0], stride) for task, w in weights.items() if w.ndim in kinds}


def with_heads_of(heads: Mapping[str, Head], path: str | Path | None, parts: str = "known") -> dict[str, Head]:
    """Return the heads of a run and those that it carries on unchanged from a checkpoint (parts ``known``)."""
    kept = heads_of(load_state_dict(path)) if path is not None and parts == "known" else {}
    return {**kept, **heads}


def state_of_task(state: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    """Return the part of a shared student's state that is one task's, under the names of a student of its own."""
    own: dict[str, Tensor] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        _, _, leaf = rest.partition(".")
        if part in ("encoder", "neck"):
            own[key] = value
        elif _task_in(key) != task:
            continue
        elif part == "heads":
            own[f"head.{leaf}"] = value
        elif part == "calibration":
            own["temperature"] = value
        else:
            module, _, tensor = leaf.partition(".")
            own[f"{module.replace('-', '.')}.{tensor}"] = value
    return own


def _task_in(key: str) -> str | None:
    part, _, rest = key.partition(".")
    return rest.partition(".")[0] if part in ("heads", "calibration", "norms") else None


def _read_by(student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the levels of a shared neck that the student of one task does not read."""
    own = student.state_dict()
    return {k: v for k, v in state.items() if k in own or not k.startswith("neck.")}
