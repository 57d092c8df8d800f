"""One student for several tasks: one encoder, one neck and a light head per task; and students that start from it."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amkd_monai.networks.student import (
    ClassStudent,
    EncodedStudent,
    FeaturePyramid,
    Student,
    feature_encoder,
    load_encoder_weights,
)
from amkd_monai.weights import CheckpointError, load_state_dict, load_strict

logger = logging.getLogger("amkd_monai")


@dataclass(frozen=True)
class Head:
    """The head of a task: ``segmentation`` (1x1 convolution at stride 4 or 2) or ``classification`` (linear)."""

    kind: str
    classes: int
    stride: int = 4


class SharedStudent(nn.Module):
    """One encoder and one feature pyramid for all tasks, each with its own batch norms in them.

    :meth:`for_task` gives the student of one task. The flat state dict has ``encoder.*``, ``neck.*``,
    ``heads.<task>.*``, ``norms.<task>.*`` and ``calibration.<task>`` (temperatures of class heads).

    Args:
        heads: {task: :class:`Head`, or the same as a dict}.
        encoder: timm name; this and further arguments as of :class:`Student` and :class:`ClassStudent`.
        neck_channels: channels of the feature pyramid.
        weights: of the encoder: ``packaged``, ``random``, or a checkpoint file.
        dropout: rate before the linear layer of class heads.
        drop_path: rate of stochastic depth in the encoder.
        seed: of the initial values that the weights don't give.
    """

    def __init__(
        self,
        heads: Mapping[str, Head | Mapping[str, Any]],
        encoder: str = "tf_efficientnet_lite0",
        neck_channels: int = 64,
        weights: str | Path = "packaged",
        dropout: float = 0.2,
        drop_path: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.specs = {task: h if isinstance(h, Head) else Head(**h) for task, h in heads.items()}
        if not heads:
            raise ValueError("A shared student needs at least one head: give it a task.")
        for task, head in self.specs.items():
            if not task.isidentifier():
                raise ValueError(f"'{task}' cannot name a task: use letters, digits and underscores.")
            if head.kind not in ("segmentation", "classification") or head.classes < 2 or head.stride not in (2, 4):
                can = "its kind is segmentation or classification, with at least two classes, at stride 2 or 4"
                raise ValueError(f"The head of '{task}' cannot be built ({head}): {can}.")
        self.dropout = dropout
        finest = min((h.stride for h in self.specs.values() if h.kind == "segmentation"), default=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = feature_encoder(encoder, range(1 if finest == 4 else 0, 5), drop_path)
            channels = list(self.encoder.feature_info.channels())
            self.neck = FeaturePyramid(channels, neck_channels)
            self.heads, self.calibration = nn.ModuleDict(), nn.Module()
            for task, h in self.specs.items():
                if h.kind == "segmentation":
                    self.heads[task] = nn.Conv2d(neck_channels, h.classes, 1)
                else:
                    self.heads[task] = nn.Linear(channels[-1], h.classes)
                    self.calibration.register_buffer(task, torch.ones(()))
        load_encoder_weights(self.encoder, encoder, weights)
        self.norms = nn.ModuleDict()
        shared = [(name, norm) for name, norm in self.named_modules() if isinstance(norm, nn.BatchNorm2d)]
        for task in self.specs:  # a module's name must not hold a dot
            self.norms[task] = nn.ModuleDict({name.replace(".", "-"): copy.deepcopy(norm) for name, norm in shared})
        for name, _ in shared:
            self.set_submodule(name, nn.Identity())

    def for_task(self, task: str) -> Student | ClassStudent:
        """Return the student of one task, made of these very modules; move the shared student to its device before."""
        if task not in self.specs:
            raise ValueError(f"The shared student has no head for '{task}': it has {', '.join(self.specs)}.")
        head = self.specs[task]
        same: dict[int, Any] = {id(p): p for part in (self.encoder, self.neck) for p in part.parameters()}
        for name, norm in self.norms[task].items():
            same[id(self.get_submodule(name.replace("-", ".")))] = norm
        encoder, neck = copy.deepcopy(self.encoder, same), copy.deepcopy(self.neck, same)  # all but the norms is shared
        kind = ClassStudent if head.kind == "classification" else Student
        view = kind.__new__(kind)
        EncodedStudent.__init__(view, encoder)
        if isinstance(view, ClassStudent):
            view.dropout = nn.Dropout(self.dropout)
            view.register_buffer("temperature", self.calibration.get_buffer(task))
        else:
            count = sum(r >= head.stride for r in self.encoder.feature_info.reduction())
            view.neck = copy.copy(neck)  # a pyramid that shares the levels down to the stride
            view.neck._modules = {"lateral": neck.lateral[:count], "smooth": neck.smooth[:count]}
        view.head, view.num_classes = self.heads[task], head.classes
        view.mean, view.std = (value.to(view.head.weight.device) for value in (view.mean, view.std))
        return view


PARTS = ("all", "known", "encoder")


def initialised(student: nn.Module, path: str | Path | None, task: str | None = None, parts: str = "all") -> nn.Module:
    """Load what a checkpoint of a shared student holds into a student, and return it.

    Args:
        student: a :class:`SharedStudent`, or the student of one task.
        path: flat state dict of a shared student; None leaves the student as it is.
        task: whose head (and batch norms) the student of one task takes.
        parts: ``all``: encoder, neck and heads, which must be the same on both sides; ``known``: encoder, neck and the
            heads that both have, so that a new task joins (shared students only); ``encoder``: that alone,
            with the batch norms of the ``task`` if it is there.
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
    whole, shared = parts in ("all", "known"), isinstance(student, SharedStudent)
    wanted = list(student.specs) if isinstance(student, SharedStudent) else [str(task)]
    missing = [t for t in wanted if t not in there]
    surplus = [t for t in there if t not in wanted]
    if whole and ((missing and not (shared and parts == "known")) or (surplus and shared)):
        what = "other heads than this run" if shared else f"no head for '{task}'"
        heads = f"missing: {', '.join(missing) or 'none'}; surplus: {', '.join(surplus) or 'none'}"
        remedy = "choose its tasks, let new ones join a shared student with init_parts 'known'"
        raise CheckpointError(f"{path} has {what} ({heads}): {remedy}, or take the encoder alone ('encoder').")
    if not shared:
        state = _read_by(student, state_of_task(state, str(task)))
    elif parts == "known":
        if missing:
            logger.warning("heads that start untrained, not in %s: %s", path, ", ".join(missing))
        own = student.state_dict()  # a new head may read a level of the neck that no head has read yet
        fresh = {k: v for k, v in own.items() if _task_in(k) in missing or k.startswith("neck.") or ".neck-" in k}
        state = {**fresh, **state}
    if not whole:
        norms = tuple(f"{name}." for name, m in student.named_modules() if isinstance(m, nn.BatchNorm2d))
        own = {k: v for k, v in student.state_dict().items() if not k.startswith("encoder.") or k.startswith(norms)}
        state = {**own, **{k: v for k, v in state.items() if k.startswith("encoder.")}}
    load_strict(student, state, path)
    logger.info("the student starts from %s (%s)", path, parts)
    return student


def takes_part_of(student: nn.Module, task: str) -> nn.Module:
    """Let the student of one task load its part of a shared student's state dict, as stock commands do."""

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
    """Return the heads that the state dict of a shared student holds, at its neck's stride; none for other networks."""
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
        part, *rest = key.split(".", 2)
        if part in ("encoder", "neck"):
            own[key] = value
        elif _task_in(key) == task:
            leaf = rest[-1].replace("-", ".")
            own["temperature" if part == "calibration" else f"head.{leaf}" if part == "heads" else leaf] = value
    return own


def _task_in(key: str) -> str | None:
    part, *rest = key.split(".")
    return rest[0] if part in ("heads", "calibration", "norms") else None


def _read_by(student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the levels of a shared neck that the student of one task does not read."""
    own = student.state_dict()
    return {k: v for k, v in state.items() if k in own or not k.startswith("neck.")}
