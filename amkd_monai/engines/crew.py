"""A crew: a deep ensemble of specialists that are larger and finer than the student, trained on the run's own labels.

Every member is trained once per fold without the labels of that fold, and once on all labels. A labelled image is
answered by the members that have not seen its group, any other by those trained on all labels. An answer is the mean
probability of the members over mirrored images (Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles, NeurIPS 2017).
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amkd_monai.cache.build import MATRIX, answers_store, images_of, view_matrix
from amkd_monai.cache.store import FeatureStore, build_missing
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.frames import finer
from amkd_monai.data.sampling import warp
from amkd_monai.data.splits import fold_of_groups
from amkd_monai.distillation.losses import area_logits, as_map
from amkd_monai.engines.crossfit import Method, answer_size, trained
from amkd_monai.engines.trainer import Recipe
from amkd_monai.errors import check_number, check_options, is_true
from amkd_monai.networks import ClassStudent, FindingStudent, Student
from amkd_monai.storage import fingerprint
from amkd_monai.weights import network_hash

logger = logging.getLogger("amkd_monai")

LITE1, LITE2 = ({"encoder": f"tf_efficientnet_lite{number}"} for number in (1, 2))
SIZES: dict[str, dict[str, Any]] = {
    "small": {"members": [LITE1], "folds": 3, "image_size": 1.5, "images": 3072},
    "default": {"members": [LITE1, LITE2], "folds": 3, "image_size": 1.75, "images": 3072},
    "large": {"members": [LITE1, LITE2, LITE1, LITE2], "folds": 5, "image_size": 2.0, "images": 4096},
}
"""Options of a crew by the word for its size; a description may give others in their place."""
FINEST = 288
"""Side in pixels up to which a factor makes images finer than the student's."""
EMA = 0.99
"""Decay per step of the averaged weights of members."""
PART_OF_LENGTH = 4
"""A member sees at least the images of the student's training divided by this."""
SMALLEST_BATCH = 8
"""Images per step of a member at least, unless the student has fewer; else as many pixels as in the student's step."""
PER_FORWARD = 16
ANSWER_COST = 0.25
"""Time to answer an image, as a part of what it takes in a training step."""


class Crew:
    """Members, and how they are trained and asked.

    Args:
        description: ``name``, ``size`` (a key of :data:`SIZES`) and what differs from it: ``members`` (options of the
            student's class such as ``encoder`` and ``seed``, or networks (B, 3, H, W) -> logits, which are copied),
            ``image_size`` (side in pixels, or a factor of the student's), ``folds``, ``images`` (that a member sees in
            training, at least), ``flips`` (whether answers are means over the flips of the recipe's augmentation),
            ``views``, and ``seed`` of folds and trainings, so that runs of several seeds share a crew. Others, and
            wrong values, are a ValueError.
        train: the training section at the student's size; a fold that would lack a class is a ValueError.
        recipe: of the run; the members' weights are averaged.
        epochs: of the run, for the length of the members.
        views: stored views of every image, unless the description tells.
        device: where members are trained and answer.
        cache_dir: folder of all stores; trained members are kept there.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        train: DecodedDataset,
        recipe: Recipe,
        epochs: int,
        views: int,
        device: torch.device | str,
        cache_dir: str,
    ) -> None:
        self.name, size = str(description["name"]), str(description.get("size", "default"))
        if size not in SIZES:
            raise self._refusal(f"has the size '{size}': use one of {', '.join(SIZES)}")
        options = {**SIZES[size], "flips": True, "views": views, "seed": 0}
        given = {key: value for key, value in description.items() if key not in ("name", "kind", "size")}
        if unknown := sorted(given.keys() - options.keys()):
            raise self._refusal(f"has no option '{unknown[0]}': use size, {', '.join(options)}")
        options |= given
        for key, least in (("folds", 2), ("images", 1), ("views", 1), ("seed", 0)):
            check_number(f"{key} of the crew '{self.name}'", options[key], least, whole=True)
        self.folds, self.views, self.seed = (options[key] for key in ("folds", "views", "seed"))
        student = FindingStudent if train.findings else Student if train.classes is None else ClassStudent
        self.members: list[nn.Module] = []
        for number, member in enumerate(options["members"] if isinstance(options["members"], (list, tuple)) else []):
            if isinstance(member, Mapping):
                classes = train.findings or train.num_classes
                member = {"seed": number, **member, "num_classes": classes, "in_channels": len(train.image(0))}
                check_options(f"member {number + 1} of the crew '{self.name}'", student, member)
                member = student(**member)
            self.members.append(member)
        if not self.members or not all(isinstance(member, nn.Module) for member in self.members):
            raise self._refusal(f"has members {options['members']}: give options such as encoder and seed")
        self.side = self._side(options["image_size"], (train.images.shape[-2], train.images.shape[-1]))
        fitting = recipe.batch_size * train.images[0, 0].size // (self.side[0] * self.side[1])
        self.recipe = replace(recipe, ema=EMA, batch_size=min(recipe.batch_size, max(SMALLEST_BATCH, fitting)))
        of_an_epoch = max(recipe.min_steps * recipe.batch_size, len(train))  # with labels alone an epoch is as long
        images = max(options["images"], epochs * of_an_epoch // PART_OF_LENGTH, int(train.has_label.sum()))
        self.steps = -(-images // self.recipe.batch_size)  # of each training
        augment = recipe.augment()
        axes = [axis for axis, wanted in ((-1, augment.flip_width), (-2, augment.flip_height)) if wanted]
        counts = range(len(axes) + 1) if is_true(options["flips"], f"flips of the crew '{self.name}'") else (0,)
        # axes over which an image is mirrored for each part of an answer
        self.mirrors = [mirrored for count in counts for mirrored in itertools.combinations(axes, count)]
        self.team, self.device, self.cache_dir = self._teams(train), device, cache_dir

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"The crew '{self.name}' {why}.")

    def _side(self, asked: Any, student: tuple[int, int]) -> tuple[int, int]:
        """Size (H, W) of the members' images, of an ``image_size`` and the student's (H, W)."""
        check_number(f"image_size of the crew '{self.name}'", asked, 1, 4096)
        if 4 < asked < 32:
            raise self._refusal(f"has image_size {asked!r}: give 32 to 4096 pixels, or a factor from 1 to 4")
        factor = asked / max(student) if asked >= 32 else min(asked, max(1.0, FINEST / max(student)))
        height, width = (round(n * factor) for n in student)
        return height, width

    def _teams(self, train: DecodedDataset) -> np.ndarray:
        """Fold of each sample (N,), ``folds`` without a label; the labels outside every fold show all classes."""
        labelled = np.flatnonzero(train.has_label)
        groups = [train.groups[i] for i in labelled]
        if self.folds > (count := len(set(groups))):
            few = f"the training section has {count} labelled groups (patients, volumes)"
            raise self._refusal(f"has {self.folds} folds, but {few}: give fewer folds or other teachers")
        classes = None if train.classes is None else train.classes[labelled]
        team = np.full(len(train), self.folds)
        team[labelled] = fold_of_groups(groups, self.folds, self.seed, classes)
        shown = train.shown_classes()
        for k in range(self.folds):
            others = labelled[team[labelled] != k]
            if len(missing := np.flatnonzero(~shown[others].any(0))):
                lacks = f"no labelled image of {train.class_in_words(int(missing[0]))} outside fold {k + 1}"
                remedy = "label more groups that show it, or name other teachers"
                raise self._refusal(f"has {lacks} of {self.folds}: {remedy}")
        return team

    def facts(self, train: DecodedDataset) -> dict[str, Any]:
        """What the run record tells of the crew of a training section."""
        mean = f"the mean of {len(self.members)} members over {len(self.mirrors)} mirrored image(s)"
        images = "decoded" if self.side == tuple(train.images.shape[-2:]) else "files"
        facts = {"steps": self.steps, "views": self.views, "asked_at": {"images": images, "size": list(self.side)}}
        return {"answers": f"cross-fitted in {self.folds} folds, {mean}", **facts}

    def answers(self, train: DecodedDataset, validation: DecodedDataset) -> list[FeatureStore]:
        """Return the stores of answers to both sections, training the members that are still missing.

        A trained member stays in ``cache_dir``, for every run with the same labels, folds and recipe.
        """
        fine, _ = seen = [self._finer(dataset) for dataset in (train, validation)]
        labelled = np.flatnonzero(self.team < self.folds)
        labels = fingerprint([(fine.ids[i], fine.hashes[i], int(self.team[i])) for i in labelled])
        networks = [network_hash(member) for member in self.members]
        key = {"members": networks, "labels": labels, "chain": fine.chain, **self._method().key, "seed": self.seed}
        key |= fine.ignores
        sections, teams = (train, validation), (self.team, np.full(len(validation), self.folds))
        stores = []
        for of, dataset, views in (("train", train, self.views), ("validation", validation, 1)):
            asked = {**key, "mirrors": self.mirrors, "of": of}
            stores.append(answers_store(self.name, asked, dataset, answer_size(dataset), self.cache_dir, views))
        if all(store.is_complete for store in stores):
            return stores
        trained_teams = self._trained(fine, labelled, key, sum(len(store) * store.views for store in stores))
        for store, dataset, images, team in zip(stores, sections, seen, teams, strict=True):
            build_missing(
                store, partial(self._shard, store, dataset, images, team, trained_teams), title=f"crew {self.name}"
            )
        return stores

    def _method(self, steps: int | None = None) -> Method:
        steps = steps or self.steps
        title = f"{steps} steps at {self.side[0]} x {self.side[1]}"
        return Method(replace(self.recipe, min_steps=steps), 1, self.seed, self.device, title)

    def _finer(self, dataset: DecodedDataset) -> DecodedDataset:
        """The samples of a dataset as the members see them: the same frame at their size."""
        if self.side == tuple(dataset.images.shape[-2:]):
            return dataset
        try:
            chain = finer(dataset.transform, self.side)
        except ValueError as error:
            raise self._refusal(f"cannot see finer images, {error}: give it image_size 1") from error
        options: dict[str, Any] = {"num_classes": dataset.num_classes, "on_bad_sample": dataset.on_bad_sample}
        options |= {"teacher_channels": dataset.teacher_channels, "findings": dataset.findings}
        fine = DecodedDataset(dataset.data, chain, dataset.directory.parent, **options)
        if fine.ids != dataset.ids:
            raise self._refusal("reads other samples than the student: give it image_size 1")
        return fine

    def _trained(
        self, fine: DecodedDataset, labelled: np.ndarray, key: Mapping[str, Any], answers: int
    ) -> list[list[nn.Module]]:
        """The members of every fold, then those of all labels: read from ``cache_dir``, or trained."""
        jobs: list[tuple[nn.Module, Path, np.ndarray]] = []
        for m, fold in itertools.product(range(len(self.members)), range(self.folds + 1)):
            # a member that is added leaves those before it as they are: their files, and the numbers of their trainings
            own = {**key, "members": [key["members"][m]]}
            path = Path(self.cache_dir) / f"{self.name}-member-{fingerprint(own, fold, m)[:16]}.pt"
            jobs.append((self.members[m], path, labelled[self.team[labelled] != fold]))
        if left := [network for network, path, _ in jobs if not path.is_file()]:
            seconds = {network: self._seconds(network, fine, labelled) for network in set(left)}
            image = sum(seconds.values()) / self.recipe.batch_size * ANSWER_COST * len(self.mirrors)
            minutes = (self.steps * sum(seconds[network] for network in left) + image * answers) / 60
            words = "teacher %s: %d trainings of %d steps at %d x %d and %d predictions, about %.0f minutes here"
            logger.info(words, self.name, len(left), self.steps, *self.side, answers, minutes)
        networks = [n.to(self.device) for n in trained(self.name, self._method(), fine, jobs)]
        return [networks[fold :: self.folds + 1] for fold in range(self.folds + 1)]

    def _seconds(self, member: nn.Module, fine: DecodedDataset, labelled: np.ndarray) -> float:
        """Seconds of a training step, measured on the second and third one."""
        taken = []
        for steps in (1, 3):
            start, copied = time.monotonic(), copy.deepcopy(member)
            self._method(steps).fit(copied, fine, labelled[: steps * self.recipe.batch_size], 0)
            taken.append(time.monotonic() - start)
        return max(0.0, taken[1] - taken[0]) / 2

    def _shard(
        self,
        store: FeatureStore,
        dataset: DecodedDataset,
        images: DecodedDataset,
        team: np.ndarray,
        networks: Sequence[Sequence[nn.Module]],
        view: int,
        shard: int,
        report: Callable[[int], object],
    ) -> dict[str, np.ndarray]:
        """Compute a shard of answers, each by the team of its sample, in the view that the shard is of."""
        samples, size = np.asarray(store.samples_of(shard)), dataset.images.shape[-2:]
        of = store.view_parameters[view] or {"view": "identity"}
        matrices = np.stack([view_matrix(of, dataset.ids[i], dataset.hashes[i], size) for i in samples])
        values = {"logits": np.empty((len(samples), *store.arrays["logits"].shape), np.float32), MATRIX: matrices}
        for k in np.unique(team[samples]):
            own = np.flatnonzero(team[samples] == k)
            for rows in np.split(own, range(PER_FORWARD, len(own), PER_FORWARD)):
                image = images_of(images, samples[rows].tolist(), self.device)
                image = warp(image, torch.from_numpy(matrices[rows])) if view else image
                values["logits"][rows] = self._ask(networks[k], image, answer_size(dataset)).cpu().numpy()
                report(len(rows))
        return {name: values[name] for name in store.arrays}

    @torch.inference_mode()
    def _ask(self, networks: Sequence[nn.Module], image: Tensor, size: tuple[int, int]) -> Tensor:
        """Logarithm of the mean probability (B, classes, h, w) of networks for images (B, 3, H, W)."""
        parts = []
        for network, axes in itertools.product(networks, self.mirrors):
            shown = image.flip(axes).contiguous(memory_format=torch.channels_last)
            answer = as_map(network.eval()(shown))
            parts.append(area_logits(answer.flip(axes) if size[1] > 1 else answer, size).softmax(1))
        return torch.stack(parts).mean(0).clamp_min(1e-7).log()
