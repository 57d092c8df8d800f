"""Cross-fitting: train on the run's own training split in folds, so that no image is answered by a net that saw it."""

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.handlers import LrScheduleHandler
from monai.inferers import sliding_window_inference
from timm.utils import ModelEmaV3
from torch import nn

from amkd_monai.cache.build import answers_store, images_of, keep_answers
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.splits import fold_of_groups
from amkd_monai.distillation import Distiller
from amkd_monai.distillation.losses import area_logits, as_map
from amkd_monai.engines.trainer import DistillationTrainer, Recipe
from amkd_monai.networks.volume_student import VolumeStudent
from amkd_monai.storage import atomic_path
from amkd_monai.terminal import progress
from amkd_monai.weights import load_state_dict, load_strict, network_hash

logger = logging.getLogger("amkd_monai")

ANSWER_STRIDE = 2
"""Cross-fitted networks' answers are kept at half the image's side: at a quarter small targets are learned worse."""


@dataclass(frozen=True)
class Method:
    """How copies of a student are trained in folds, supervised, and how they answer."""

    recipe: Recipe
    epochs: int
    seed: int
    device: torch.device | str
    title: str  # what is trained and for how long, for messages

    @property
    def key(self) -> dict[str, Any]:
        """What the answers depend on besides network, folds and seed."""
        own = {name: value for name, value in asdict(self.recipe).items() if name != "first_stage"}  # needs teachers
        return {"recipe": own, "epochs": self.epochs}

    def fit(self, network: nn.Module, dataset: DecodedDataset, indices: np.ndarray, fold: int) -> None:
        """Train a network on samples of a dataset; ``fold`` is the number of the training."""
        recipe, seed, device = self.recipe, self.seed + fold, self.device
        of_patches, distiller = isinstance(network, VolumeStudent), Distiller(network, batch_dice=recipe.batch_dice)
        distiller.to(device, memory_format=torch.preserve_format if of_patches else torch.channels_last)
        loader = recipe.loader(dataset, seed, indices=indices, distributed=False)
        optimizer = recipe.optimizer(distiller)
        scheduler = recipe.scheduler(optimizer, self.epochs * len(loader))
        options: dict[str, Any] = {"augmentation": recipe.augment(), "seed": seed}
        options["train_handlers"] = [LrScheduleHandler(scheduler, print_lr=False, epoch_level=False)]
        trainer = DistillationTrainer(device, self.epochs, loader, distiller, optimizer, **options)
        trainer.logger.setLevel(logging.WARNING)
        average = ModelEmaV3(network, recipe.ema, use_warmup=True) if recipe.ema else None
        with progress(total=self.epochs * len(loader), desc=f"{self.title}, training {fold + 1}") as bar:
            step = Events.ITERATION_COMPLETED
            trainer.add_event_handler(step, lambda _: bar.update(1))
            if average is not None:
                trainer.add_event_handler(step, lambda e: average.update(network, e.state.iteration))
            trainer.run()
        if average is not None:
            network.load_state_dict(average.module.state_dict())

    @torch.inference_mode()
    def predict(self, network: nn.Module, dataset: DecodedDataset, indices: np.ndarray) -> np.ndarray:
        """Answers (n, classes, H / 2, W / 2), or (n, classes, 1, 1) and (n, 2, F, 1) of images, to n samples.

        They are uncalibrated, as in training: a student may start from one that was calibrated.
        """
        where = next(network.parameters()).device
        network.eval()
        if isinstance(network, VolumeStudent):
            return _answer_volumes(network, dataset, indices)
        batches = (indices[start : start + 16].tolist() for start in range(0, len(indices), 16))
        images = (images_of(dataset, rows, where) for rows in batches)
        answers = (network.decode(network.encode(image), list(image.shape[-2:])) for image in images)
        return np.concatenate([area_logits(as_map(z), answer_size(dataset)).cpu().numpy() for z in answers])


def answer_size(dataset: DecodedDataset) -> tuple[int, int]:
    """Grid (h, w) at which cross-fitted answers are kept: one cell where an image has one class, (F, 1) of findings."""
    if dataset.classes is not None:
        return dataset.findings or 1, 1
    height, width = dataset.images.shape[-2:]
    return height // ANSWER_STRIDE, width // ANSWER_STRIDE


def trained(
    name: str, method: Method, dataset: DecodedDataset, jobs: Sequence[tuple[nn.Module, Path, np.ndarray]]
) -> Iterator[nn.Module]:
    """Yield a trained copy of each network: read from its file, where an earlier, perhaps interrupted, call left it.

    ``jobs`` are the network as it starts, the file, and the samples (n,) of the dataset that it learns.
    """
    seconds: list[float] = []
    for number, (network, path, rows) in enumerate(jobs):
        copied, missing = copy.deepcopy(network), sum(not file.is_file() for _, file, _ in jobs[number:])
        if path.is_file():
            load_strict(copied, load_state_dict(path), path)
        else:
            left = f"; about {np.mean(seconds) * missing / 60:.1f} minutes left" if seconds else ""
            logger.info("training %s, %s: %d of %d%s", name, method.title, number + 1, len(jobs), left)
            start = time.monotonic()
            method.fit(copied, dataset, rows, number)
            seconds.append(time.monotonic() - start)
            with atomic_path(path) as temporary:
                torch.save(copied.state_dict(), temporary)
        yield copied


def cross_fit(
    name: str,
    network: nn.Module,
    sections: Sequence[DecodedDataset],
    method: Method,
    folds: int,
    seed: int,
    cache_dir: str,
) -> list[FeatureStore]:
    """Train one copy of a network per fold; answer each fold by the copy that has not seen it.

    Unlabelled samples and those of further sections, which no copy has seen, are answered by the mean probability of
    all copies. A finished result is read from its stores; a finished fold of an interrupted one is not trained again.
    Returns the store of answers to each section: the training split, and the validation split if it is to be answered.
    ``network`` is copied, never changed; ``seed`` is that of the folds by group.
    """
    train, size = sections[0], answer_size(sections[0])
    network_key = {"network": network_hash(network), "folds": folds, "seed": seed, "labels": train.hashes}
    network_key |= train.ignores
    stores = [
        answers_store(name, {**method.key, **network_key, "of": of}, dataset, size, cache_dir)
        for of, dataset in zip(("train", "validation")[: len(sections)], sections, strict=True)
    ]
    labelled, unlabelled = np.flatnonzero(train.has_label), np.flatnonzero(~train.has_label)
    classes = None if train.classes is None else train.classes[labelled]
    fold = fold_of_groups([train.groups[i] for i in labelled], folds, seed, classes)
    count, shown = int(fold.max()) + 1, train.shown_classes()[labelled]
    taught = np.all([shown[fold != k].any(0) for k in range(count)], 0)
    if alone := [train.class_in_words(int(n)) for n in np.flatnonzero(shown.any(0) & ~taught)]:
        low = "one fold has all labelled images of %s, so %s is scored too low: label more groups that show it"
        logger.warning(low, ", ".join(alone), name)
    if all(store.is_complete for store in stores):
        return stores
    logits = np.zeros((len(train), train.num_classes, *size), dtype=np.float32)
    unseen = [(train, unlabelled), *((dataset, np.arange(len(dataset))) for dataset in sections[1:])]
    means = [np.zeros((len(rows), *logits.shape[1:]), dtype=np.float32) for _, rows in unseen]
    files = [stores[0].directory.with_name(f"{stores[0].directory.name}-fold{k}.pt") for k in range(count)]
    jobs = [(network, file, np.concatenate([labelled[fold != k], unlabelled])) for k, file in enumerate(files)]
    for k, copied in enumerate(trained(name, method, train, jobs)):
        held_out = labelled[fold == k]
        logits[held_out] = method.predict(copied, train, held_out)
        for mean, (dataset, rows) in zip(means, unseen, strict=True):
            if len(rows):
                mean += torch.from_numpy(method.predict(copied, dataset, rows)).softmax(1).numpy() / count
    logits[unlabelled], *others = (np.log(mean.clip(1e-7)) for mean in means)
    for store, answers in zip(stores, (logits, *others), strict=True):
        keep_answers(store, answers)
    for file in files:
        file.unlink(missing_ok=True)
    return stores


def _answer_volumes(network: VolumeStudent, dataset: DecodedDataset, indices: np.ndarray) -> np.ndarray:
    """Answers (n, classes, H / 2, W / 2) of a 3D network to slices, each from its whole volume, patch by patch."""
    cases, device = np.asarray(dataset.cases), next(network.parameters()).device
    answers: dict[int, np.ndarray] = {}
    for case in dict.fromkeys(cases[indices]):
        rows = np.flatnonzero(cases == case)
        volume = torch.from_numpy(np.array(dataset.images[rows[0] : rows[-1] + 1].swapaxes(0, 1))).float() / 255
        patch = (network.slices, *volume.shape[-2:])
        logits = sliding_window_inference(volume[None].to(device), patch, 2, network, overlap=0.25)
        slices = logits[0].float().transpose(0, 1)  # (C, D, H, W) -> (D, C, H, W)
        slices = nn.functional.adaptive_avg_pool2d(slices, answer_size(dataset)).cpu().numpy()
        answers.update(zip(rows.tolist(), slices, strict=True))
    return np.stack([answers[int(i)] for i in indices])
