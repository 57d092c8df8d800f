"""What a batch is made of: the samples and tasks that are drawn, and the random changes of its images.

Draws are pure functions of seed and epoch, so that a resumed run draws the same. Parameters of changes are sampled
first and applied later, so that they can be replayed. One affine matrix per sample warps image, label and cached
teacher maps alike. Warping is exact for labels and logits; for feature maps it depends on the change
(:meth:`Augmentation.check_features`). An un-warped map would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from amkd_monai.errors import check_number, is_true

PASSES = 1_000  # most passes over a task's data in one epoch; keeps the seeds of epochs and passes apart


class BatchSampler(Sampler[list[int]]):
    """Batches that mix labelled with unlabelled samples and can prefer those with foreground, or rare classes.

    Every labelled sample is drawn about equally often (permutations, one after another). An epoch has as many steps
    as all samples fill, whether unlabelled ones are used or not, and at least ``min_steps``.

    ``has_label``, ``has_foreground``, ``groups`` and ``classes`` (-1 where unknown) have one value per sample,
    ``indices`` restrict to some samples. A batch of ``batch_size`` samples of one process has ``labelled_fraction``
    labelled ones where unlabelled ones are used (of no use without a teacher), and of those ``foreground_fraction``
    with foreground; None takes them as they come. Unlabelled ones are drawn so that their groups come equally often.
    ``class_balance`` 0 draws classes as often as they occur, 1 equally often; between, by n^(1 - class_balance).
    ``first_stage`` is the part of the run whose batches mix; the caller sets ``labelled_only`` behind it. Each of
    ``world_size`` processes takes its own part of the epoch.
    """

    def __init__(
        self,
        has_label: Sequence[bool] | np.ndarray,
        has_foreground: Sequence[bool] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        use_unlabelled: bool = False,
        labelled_fraction: float = 0.5,
        foreground_fraction: float | None = None,
        groups: Sequence[str] | None = None,
        classes: Sequence[int] | np.ndarray | None = None,
        class_balance: float = 0.0,
        indices: Sequence[int] | np.ndarray | None = None,
        min_steps: int = 1,
        first_stage: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        labelled_mask, foreground_mask = np.asarray(has_label, bool), np.asarray(has_foreground, bool)
        pool = np.arange(len(labelled_mask)) if indices is None else np.asarray(indices, dtype=int)
        self.labelled = pool[labelled_mask[pool]]
        self.unlabelled = pool[~labelled_mask[pool]] if use_unlabelled else pool[:0]
        by_group: dict[object, list[int]] = {}
        for i in self.unlabelled:
            by_group.setdefault(i if groups is None else groups[i], []).append(i)
        self.unlabelled_groups = [np.array(members) for members in by_group.values()]
        if len(self.labelled) == 0:
            raise ValueError("There is no labelled sample to train on: check the labels and the split.")
        if class_balance > 0 and classes is None:
            raise ValueError(f"recipe#class_balance is {class_balance}, but labels are masks: give 0.")
        self.strata: list[tuple[np.ndarray, float]] = []
        front = foreground_mask[self.labelled]
        if class_balance > 0:
            known = np.asarray(classes)[self.labelled]
            pools = [self.labelled[known == c] for c in np.unique(known)]
            sizes = np.array([len(members) ** (1 - class_balance) for members in pools])
            self.strata = list(zip(pools, (sizes / sizes.sum()).tolist(), strict=True))
        elif foreground_fraction is not None and front.any() and not front.all():
            shares = foreground_fraction, 1 - foreground_fraction
            self.strata = list(zip((self.labelled[front], self.labelled[~front]), shares, strict=True))
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        wanted = round(batch_size * (1 - labelled_fraction)) if len(self.unlabelled) else 0
        self.mixed, self.first_stage, self.labelled_only = min(wanted, batch_size - 1), first_stage, False
        if len(self.unlabelled) and labelled_fraction < 1 and not self.mixed:
            what = f"recipe#batch_size {batch_size} with recipe#labelled_fraction {labelled_fraction}"
            raise ValueError(f"{what} leaves no room for images without labels: raise batch_size, or give fraction 1.")
        self.steps = max(min_steps, math.ceil(len(pool) / (batch_size * world_size)))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        total = self.steps * self.batch_size * self.world_size
        count = (self.batch_size - (0 if self.labelled_only else self.mixed)) * self.steps * self.world_size
        strata = self.strata or [(self.labelled, 1.0)]
        ends = [round(count * share) for share in np.cumsum([share for _, share in strata])]
        counts = np.diff([0, *ends[:-1], count])
        labelled = np.concatenate([_cycle(pool, int(n), rng) for (pool, _), n in zip(strata, counts, strict=True)])
        if self.strata:
            rng.shuffle(labelled)
        order = _cycle(np.arange(len(self.unlabelled_groups)), total - count, rng)
        others = np.zeros(len(order), dtype=int)
        for number, members in enumerate(self.unlabelled_groups):
            others[order == number] = _cycle(members, int((order == number).sum()), rng)
        parts = [part.reshape(self.steps, self.world_size, -1)[:, self.rank] for part in (labelled, others)]
        yield from np.concatenate(parts, axis=1).astype(int).tolist()


class PatchSampler(BatchSampler):
    """Batches of patches of volumes: ``slices`` consecutive slices around each sample that a batch sampler draws.

    A case with fewer slices gives its last one several times. ``batch_size`` counts patches; ``first`` and ``last`` are
    the first and last slice of each sample's case, the other arguments those of :class:`BatchSampler`.
    """

    def __init__(
        self, *arguments: Any, first: np.ndarray, last: np.ndarray, slices: int, min_steps: int = 1, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.first, self.last, self.slices = first, last, slices
        self.steps = max(min_steps, math.ceil(self.steps / slices))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield [int(index) for centre in batch for index in self.patch(centre)]

    def patch(self, centre: int) -> np.ndarray:
        """Return the indices (slices,) of the patch around a sample; the last one repeats at the end of its volume."""
        start = max(self.first[centre], min(centre - self.slices // 2, self.last[centre] - self.slices + 1))
        return np.minimum(np.arange(start, start + self.slices), self.last[centre])


def _cycle(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` samples as permutations of the pool, one after another."""
    rounds = math.ceil(count / max(1, len(pool)))
    return np.concatenate([rng.permutation(pool) for _ in range(rounds)] or [pool[:0]])[:count]


class MultiTaskLoader:
    """Steps of several tasks: each step holds one batch of every task that it drew, ``{task: batch}``.

    ``loaders`` are by task, each over a :class:`BatchSampler`. ``alpha`` 0 draws tasks equally often, 1 as often as
    they have samples N; between, with N^alpha. ``tasks_per_step`` None takes all of them, ``steps`` None as many steps
    an epoch as all samples fill.
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
        check_number("sampling_alpha", alpha, 0, 1)
        check_number("tasks_per_step", 1 if tasks_per_step is None else tasks_per_step, 1, whole=True)
        self.per_step = min(tasks_per_step or len(loaders), len(loaders))
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
        how = {"size": self.per_step, "replace": False, "p": self.probabilities}
        return [[names[i] for i in sorted(rng.choice(len(names), **how))] for _ in range(self.steps)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        streams = {task: self._stream(loader) for task, loader in self.loaders.items()}
        for tasks in self.plan():
            yield {task: next(streams[task]) for task in tasks}

    def _stream(self, loader: DataLoader) -> Iterator[Any]:
        """Batches of one task, pass after pass over its data, each pass in an order of its own."""
        for number in range(PASSES):
            if isinstance(loader.batch_sampler, BatchSampler):
                loader.batch_sampler.set_epoch(self.epoch * PASSES + number)
            yield from loader


VALIDITIES = ("exact", "approximate", "invalid")  # what warping makes of a cached feature map
LARGEST_APPROXIMATE = {"rotation": 0.6, "scale": 0.5, "shift": 0.5, "flip_height": 1.0, "flip_width": 1.0}
"""Largest geometric changes of which warped feature maps are an approximation.

Cosine of a warped map with the map of the warped image, ImageNet EfficientNet-Lite0, stride 16: shift by a cell 0.998,
zoom 1.2 0.84, horizontal flip 0.82, rotation by 10 degrees 0.86, by 25 degrees 0.77, by 90 degrees 0.52.
"""


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes."""

    together: int = 1  # samples, one after another, that are changed alike: the slices of a patch
    _: KW_ONLY
    rotation: float = 0.0  # largest angle, radians
    scale: float = 0.0  # largest relative zoom, e.g. 0.15 for 1/1.15 to 1.15
    shift: float = 0.0  # largest shift as a part of the side
    flip_height: bool = False  # whether to mirror that axis with probability 1/2
    flip_width: bool = False
    gain: float = 0.0  # largest relative change of intensity per image
    offset: float = 0.0  # largest added intensity, in [0, 1] units
    colour: float = 0.0  # largest relative gain change per channel
    gamma: float = 0.0  # largest relative change of the exponent, e.g. 0.4 for x^(1/1.4) to x^1.4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.startswith("flip_"):
                object.__setattr__(self, name, is_true(value, f"recipe#augmentation#{name}"))
            else:
                check_number(f"recipe#augmentation#{name}", value, 0)

    def check_features(self, accepted: str) -> None:
        """Refuse geometric changes that make warped cached feature maps worse than ``accepted``, of ``VALIDITIES``.

        Raises:
            ValueError: a change is worse, or ``accepted`` is no validity.
        """
        if accepted not in VALIDITIES:
            raise ValueError(f"`warped_features` is '{accepted}': use one of {', '.join(VALIDITIES)}.")
        for name, largest in LARGEST_APPROXIMATE.items():
            value = getattr(self, name)
            validity = "exact" if value == 0 else "approximate" if value <= largest else "invalid"
            if VALIDITIES.index(validity) > VALIDITIES.index(accepted):
                remedy = f"lower it, store `views` instead, or accept it by `warped_features`: '{validity}'"
                raise ValueError(f"The {name} of {value} makes cached teacher features {validity}: {remedy}.")

    def sample(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw affine matrices (B, 2, 3) in the normalised coordinates of ``affine_grid`` for maps of (H, W)."""
        count = batch // self.together

        def uniform(limit: float) -> Tensor:
            return (torch.rand(count, generator=generator) * 2 - 1) * limit

        def sign(wanted: bool) -> Tensor:
            return 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float() * float(wanted)

        angle, zoom = uniform(self.rotation), torch.exp(uniform(math.log1p(self.scale)))
        shift_x, shift_y = uniform(2 * self.shift), uniform(2 * self.shift)
        flip_x, flip_y = sign(self.flip_width), sign(self.flip_height)
        height, width = size
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        rows = [
            torch.stack([cos * flip_x, -sin * flip_y * height / width, shift_x], dim=1),
            torch.stack([sin * flip_x * width / height, cos * flip_y, shift_y], dim=1),
        ]
        return torch.stack(rows, dim=1).repeat_interleave(self.together, 0)

    def photometric(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Change gamma, gain, offset and colour of an image (B, C, H, W) in [0, 1]; a teacher never sees this."""
        draw = torch.rand((len(image) // self.together, 6), generator=generator).to(image.device) * 2 - 1
        draw = draw.repeat_interleave(self.together, 0)
        channels = image.shape[1]
        colours = draw[:, 1:4].repeat(1, -(-channels // 3))[:, :channels]
        gain = 1 + self.gain * draw[:, 0, None] + self.colour * colours  # (B, C)
        gamma = torch.exp(draw[:, 5] * math.log1p(self.gamma))
        image = image.clamp_min(0) ** gamma[:, None, None, None]
        return (image * gain[:, :, None, None] + self.offset * draw[:, 4, None, None, None]).clamp(0, 1)


def warp(maps: Tensor, theta: Tensor, mode: str = "bilinear") -> Tensor:
    """Warp maps (B, C, h, w) of any size by the affine matrices (B, 2, 3) of :meth:`Augmentation.sample`.

    Beyond the border the image is mirrored, alike at every resolution. Cells of a map of width 1 describe the whole
    image and pass through.
    """
    if maps.shape[-1] == 1:
        return maps
    grid = F.affine_grid(theta.to(maps), list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode=mode, padding_mode="reflection", align_corners=False)
