"""The contract every teacher fulfils, the kinds of teacher, and how a description becomes one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from amkd_monai.errors import check_number, check_options, class_of
from amkd_monai.teachers.catalogue import CATALOGUE
from amkd_monai.weights import file_sha256, state_hash


@dataclass
class TeacherFeatures:
    """A teacher's outputs for a batch of images, None where it has no such output."""

    grid: Tensor | None = None  # feature map (B, C, h, w)
    pooled: Tensor | None = None  # one vector per image (B, C')
    logits: Tensor | None = None  # its own answer (B, classes, h', w'), or (B, classes) for the whole image


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of a teacher without its network."""

    name: str
    licence: str
    fingerprint: str  # SHA-256 over class, weights and preprocessing
    preprocessing: dict[str, Any]  # JSON-able description of what outputs depend on besides the weights
    is_random: bool
    weights_file: dict[str, str] | None
    side: int | None  # pixels of the shorter side of images at which it sees all it can, None for images as they come


class Teacher(nn.Module):
    """A frozen network with its own preprocessing.

    A subclass implements :meth:`forward`, and ``settings`` or :meth:`preprocessing`. Options that several kinds share:
    ``weights`` (a weight file, a folder that holds it, None to search for it, or ``random``, which marks the run as a
    test), ``image_size`` (side in pixels, or height and width, to which images are squashed; None takes them as they
    come), ``mean`` and ``std`` (per channel of RGB in [0, 1]), ``interpolation`` (``bilinear`` or ``bicubic``, both
    anti-aliased) and ``grid_limit`` (feature maps are area-pooled down to at most this many cells a side). Wrong
    options are a ``ValueError``, weights that are missing or do not fit a ``CheckpointError``.

    ``name`` is unique in a run; students may inherit limits from the ``licence`` of the weights. ``precision`` is
    ``float32``, or ``bfloat16`` for autocast of the network (inputs and outputs stay float32).
    """

    uses_labels = False  # whether its forward takes the label (B, 1, H, W) as a second argument
    settings: tuple[str, ...] = ()  # names of the attributes, besides the weights, on which its outputs depend
    image_size: int | tuple[int, int] | None = None
    interpolation = "bilinear"

    def __init__(self, name: str, licence: str = "unknown", precision: str = "float32") -> None:
        super().__init__()
        self.name, self.licence = name, licence
        self.precision = self.one_of("precision", precision, ("float32", "bfloat16"))
        self.is_random = False  # random weights make the run a test
        self.weights_file: dict[str, str] | None = None  # name and SHA-256 of the file its weights came from
        self.read_from: list[Path] = []  # paths of such files

    def one_of(self, option: str, value: Any, known: Sequence[Any]) -> Any:
        """Return the value of an option; any other than the known ones is a ValueError."""
        if value not in known:
            raise ValueError(
                f"The teacher '{self.name}' has {option} {value}: use one of {', '.join(map(str, known))}."
            )
        return value

    def came_from(self, path: str | Path) -> None:
        """Remember the file of the weights for the run record; a network on the meta device holds none of them."""
        if torch.get_default_device().type != "meta":
            self.weights_file = {"file": Path(path).name, "sha256": file_sha256(path)}
            self.read_from.append(Path(path).absolute())

    def set_input(
        self,
        image_size: int | Sequence[int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
    ) -> None:
        """Set what :meth:`prepare` makes of images: their size and how it is reached, mean and std of [0, 1] RGB."""
        sides = [image_size] if isinstance(image_size, int) else list(image_size or [1])
        if len(sides) > 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"The teacher '{self.name}' has image_size {image_size}: use a side or [height, width].")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"The teacher '{self.name}' has mean {mean}, std {std}: give three numbers each, std > 0.")
        self.image_size = image_size if image_size is None or isinstance(image_size, int) else (sides[0], sides[-1])
        self.interpolation = self.one_of("interpolation", interpolation, ("bilinear", "bicubic"))
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input for images (B, 3, H, W), RGB in [0, 1], as :meth:`set_input` says."""
        return (resize(image, self.image_size, self.interpolation) - self.mean) / self.std

    def autocast(self, image: Tensor) -> AbstractContextManager:
        """Return the context in which the network runs on the device of ``image``."""
        kind = "cpu" if image.is_meta else image.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16")

    def freeze(self) -> Teacher:
        """Take every parameter out of training and switch to evaluation mode."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: ``mode`` is ignored, since a teacher's statistics must never drift."""
        return super().train(False)

    def preprocessing(self) -> dict[str, Any]:
        """Return a JSON-able description of what outputs depend on besides the weights, here ``settings``."""
        if not self.settings:
            raise NotImplementedError
        values = {name: getattr(self, name) for name in self.settings}
        return {name: v.flatten().tolist() if isinstance(v, Tensor) else v for name, v in values.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the class, the weights and the preprocessing."""
        facts = [type(self).__name__, state_hash(self.state_dict()), self.preprocessing()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def side(self) -> int | None:
        """Pixels of the shorter side of images at which the teacher sees all it can: its ``image_size``, if any."""
        return max(self.image_size) if isinstance(self.image_size, tuple) else self.image_size

    def facts(self) -> TeacherFacts:
        """Return what is known of the teacher without its network; hashes its weights."""
        rest = self.is_random, self.weights_file, self.side
        return TeacherFacts(self.name, self.licence, self.fingerprint, self.preprocessing(), *rest)

    def ready(self) -> Teacher:
        """Return the teacher itself, which is built."""
        return self

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return the features of an image (B, 3, H, W), RGB in [0, 1]."""
        raise NotImplementedError


def resize(image: Tensor, size: tuple[int, int] | int | None, mode: str = "bilinear") -> Tensor:
    """Resize (B, C, H, W) in [0, 1] with anti-aliasing to (H, W) or a square; None keeps the size."""
    size = (size, size) if isinstance(size, int) else size
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = F.interpolate(image, size=size, mode=mode, antialias=True, align_corners=False)
    return resized.clamp(0, 1) if mode == "bicubic" else resized  # whose kernel overshoots at edges


def pool_to_grid(grid: Tensor, limit: int) -> Tensor:
    """Area-pool a map (B, C, h, w) down to at most ``limit`` cells a side; a map is never up-sampled."""
    size = tuple(min(side, limit) for side in grid.shape[-2:])
    return grid if size == tuple(grid.shape[-2:]) else F.adaptive_avg_pool2d(grid, size)


def binary_to_two_class(logits: Tensor) -> Tensor:
    """Turn sigmoid logits (B, 1, h, w) into two-class softmax logits (B, 2, h, w) of the same probabilities."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


class _AsAllocated(TorchFunctionMode):
    """Leaves the memory of new parameters as it is where random numbers would fill it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("uniform_", "normal_", "erfinv_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def fixed_initialisation(seed: int = 0, replaced: bool = False) -> Iterator[None]:
    """Build a network with the same random weights each time, and leave the caller's random state as it was.

    ``replaced`` says that a file's weights replace all of them: none are drawn, which would take seconds.
    """
    with torch.random.fork_rng(devices=[]), _AsAllocated() if replaced else nullcontext():
        torch.manual_seed(seed)
        yield


KINDS: dict[str, str] = {
    "timm": "amkd_monai.teachers.timm_encoder.TimmTeacher",
    "transformers": "amkd_monai.teachers.transformers_encoder.TransformersTeacher",
    "specialist": "amkd_monai.teachers.specialist.SpecialistTeacher",
    "student": "amkd_monai.teachers.timm_encoder.StudentTeacher",
    "medsam": "amkd_monai.teachers.medsam.MedSAMTeacher",
    "retfound": "amkd_monai.teachers.retfound.RETFoundTeacher",
    "usfm": "amkd_monai.teachers.usfm.USFMTeacher",
    "biomedparse": "amkd_monai.teachers.biomedparse.BiomedParseTeacher",
}
"""Teachers that answer image by image. To add one: one file with a ``Teacher``, and a line here or its path as kind."""

CROSS_FITTED_KINDS = ("crew", "crossfit_volume_specialist")
"""Teachers that are trained on the run's own training split, in folds (``crew`` and ``crossfit`` of ``engines``)."""

VOLUME_OPTIONS = ("network", "folds", "slices", "steps", "learning_rate")
"""Options of a ``crossfit_volume_specialist``; those of a crew are checked by itself."""


def validate_descriptions(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Check names and kinds before anything is built; one that is missing, unknown or given twice is a ValueError."""
    if not (isinstance(descriptions, (list, tuple)) and all(isinstance(d, Mapping) for d in descriptions)):
        raise ValueError(f"teachers is {descriptions!r}: give a word or a list of descriptions, see docs/teachers.md.")
    seen: set[str] = set()
    for description in descriptions:
        name, kind = description.get("name"), description.get("kind")
        if not name:
            raise ValueError(f'The teacher {dict(description)} has no name: add "name" to its entry in `teachers`.')
        if kind not in KINDS and kind not in CROSS_FITTED_KINDS and "." not in str(kind):
            known = ", ".join((*KINDS, *CROSS_FITTED_KINDS))
            raise ValueError(f"The teacher '{name}' has the unknown kind '{kind}': use {known}, or module.Class.")
        if name in seen:
            raise ValueError(f"Two teachers are named '{name}': give each its own name in `teachers`.")
        for key in ("own_answers", "cross_fit"):
            if not isinstance(description.get(key, True), bool):
                raise ValueError(f"The teacher '{name}' has {key} {description[key]!r}: give true or false.")
        seen.add(str(name))


def bound(
    description: Mapping[str, Any], weights_dir: str | None = None
) -> tuple[type[Teacher] | None, dict[str, Any]]:
    """Return the class of a teacher and its arguments; None and its options for a cross-fitted one.

    A description has ``name``, ``kind`` and the options of the kind; the preparation reads ``own_answers`` and
    ``cross_fit``. ``weights_dir`` is searched first where the kind has official weights and none are named. An option
    that is unknown or missing is a ValueError.
    """
    validate_descriptions([description])
    name, kind = description["name"], description["kind"]
    if kind in CROSS_FITTED_KINDS:
        options = {k: v for k, v in description.items() if k not in ("name", "kind")}
        if kind == "crossfit_volume_specialist":
            if unknown := sorted(options.keys() - set(VOLUME_OPTIONS)):
                known = ", ".join(VOLUME_OPTIONS)
                raise ValueError(f"The teacher '{name}' has no option '{unknown[0]}': use {known}.")
            if not isinstance(options.get("network"), nn.Module):
                raise ValueError(f"The teacher '{name}' needs a network: add \"network\" to its entry in `teachers`.")
        return None, options
    options = {k: v for k, v in description.items() if k not in ("kind", "own_answers", "cross_fit")}
    if weights_dir is not None and any(e.key and e.kind == kind for e in CATALOGUE):
        options.setdefault("weights", weights_dir)
    chosen = class_of("kind of teacher", kind, KINDS, Teacher)
    check_options(f"teacher '{name}'", chosen, options)
    for key in {"grid_limit", "stride"} & options.keys() if kind in KINDS else ():
        check_number(f"{key} of the teacher '{name}'", options[key], 1, whole=True)
    return chosen, options


def build_teacher(description: Mapping[str, Any], weights_dir: str | None = None) -> Teacher:
    """Build one frozen teacher from its description, as :func:`bound` reads it.

    A ValueError if only a run can make it, a CheckpointError if its weights are missing or do not fit.
    """
    chosen, options = bound(description, weights_dir)
    if chosen is None:
        kind, name = description["kind"], description["name"]
        raise ValueError(f"The {kind} '{name}' is trained on a run's own images: list it in `teachers` of a run.")
    return chosen(**options)
