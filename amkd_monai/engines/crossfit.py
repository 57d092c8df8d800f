"""Cross-fitting: train on the run's own training split in folds, so that no image is answered by a net that saw it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.handlers import LrScheduleHandler
from torch import nn

from amkd_monai.atomic import atomic_path
from amkd_monai.cache.build import answers_store, images_of, keep_answers
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.splits import fold_of_groups
from amkd_monai.distillation import Distiller
from amkd_monai.distillation.losses import area_logits, as_map
from amkd_monai.engines.recipe import Recipe
from amkd_monai.engines.trainer import DistillationTrainer
from amkd_monai.terminal import progress
from amkd_monai.weights import load_state_dict, load_strict, state_hash

logger = logging.getLogger("amkd_monai")

ANSWER_STRIDE = 4
"""Cross-fitted networks' answers are kept at a quarter of the image's side."""

Fit = Callable[[nn.Module, DecodedDataset, np.ndarray, int], None]
Predict = Callable[[nn.Module, DecodedDataset, np.ndarray], np.ndarray]


def fit_student(recipe: Recipe, epochs: int, seed: int, device: torch.device | str, title: str) -> Fit:
    """Return a function that trains a student on some samples, supervised, with the run's own recipe."""

    def fit(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray, fold: int) -> None:
        weights = recipe.class_weights(dataset)
        distiller = Distiller(network, batch_dice=recipe.batch_dice, class_weights=weights).to(
            device, memory_format=torch.channels_last
        )
        loader = recipe.loader(dataset, seed + fold, indices=indices, distributed=False)
        optimizer = recipe.optimizer(distiller)
        scheduler = recipe.scheduler(optimizer, epochs * len(loader))
        trainer = DistillationTrainer(
            device=device,
            max_epochs=epochs,
            train_data_loader=loader,
            network=distiller,
            optimizer=optimizer,
            augmentation=recipe.augment(),
            seed=seed + fold,
            train_handlers=[LrScheduleHandler(scheduler, print_lr=False, epoch_level=False)],
        )
        trainer.logger.setLevel(logging.WARNING)
        with progress(total=epochs * len(loader), desc=f"cross-fit {title}, fold {fold + 1}") as bar:
            from ignite.engine import Events

            trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: bar.update(1))
            trainer.run()

    return fit


@torch.inference_mode()
def predict_student(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray) -> np.ndarray:
    """Answer samples with a student: logits (N, classes, H / 4, W / 4), or (N, classes, 1, 1) for classes of images."""
    device = next(network.parameters()).device
    network.eval()
    size = answer_size(dataset)
    parts = []
    for start in range(0, len(indices), 16):
        images = torch.cat([images_of(dataset, range(i, i + 1), device) for i in indices[start : start + 16]])
        parts.append(area_logits(as_map(network(images)), size).cpu().numpy())
    return np.concatenate(parts)


def answer_size(dataset: DecodedDataset) -> tuple[int, int]:
    """Grid (h, w) at which cross-fitted answers are kept: one cell where an image has one class."""
    if dataset.classes is not None:
        return 1, 1
    height, width = dataset.images.shape[-2:]
    return height // ANSWER_STRIDE, width // ANSWER_STRIDE


def cross_fit(
    name: str,
    network: nn.Module,
    train: DecodedDataset,
    validation: DecodedDataset | None,
    fit: Fit,
    predict: Predict,
    key: dict[str, Any],
    folds: int,
    seed: int,
    cache_dir: str,
) -> tuple[FeatureStore, FeatureStore | None]:
    """Train one copy of a network per fold; answer each fold by the copy that has not seen it.

    Unlabelled and validation samples, seen by no copy, are answered by the mean probability of all.

    Args:
        name: of the stores.
        network: initial network; it is copied, never changed.
        train: training split.
        validation: validation split, or None.
        fit: trains a network on sample indices.
        predict: gives logits (n, classes, h, w) for sample indices.
        key: what the result depends on besides network, folds and seed.
        folds: number of folds by group.
        seed: of the folds.
        cache_dir: folder of the stores; a finished result is read from there, and so is each finished fold.

    Returns:
        The stores of answers to the training and the validation split.
    """
    key = {**key, "network": state_hash(network.state_dict()), "folds": folds, "seed": seed, "labels": train.hashes}
    size = answer_size(train)
    stores = [answers_store(name, {**key, "of": "train"}, train, size, cache_dir)]
    if validation is not None:
        stores.append(answers_store(name, {**key, "of": "validation"}, validation, size, cache_dir))
    if not all(store.is_complete for store in stores):
        labelled = np.flatnonzero(train.has_label)
        unlabelled = np.flatnonzero(~train.has_label)
        classes = None if train.classes is None else train.classes[labelled]
        fold = fold_of_groups([train.groups[i] for i in labelled], folds, seed, classes)
        answers = np.zeros((len(train), train.num_classes, *size), dtype=np.float32)
        others = np.zeros((len(unlabelled), *answers.shape[1:]), dtype=np.float32)
        outside = None if validation is None else np.zeros((len(validation), *answers.shape[1:]), dtype=np.float32)
        count = int(fold.max()) + 1
        trained = [stores[0].directory.with_name(f"{stores[0].directory.name}-fold{k}.pt") for k in range(count)]
        for k in range(count):
            copied = copy.deepcopy(network)
            logger.info("cross-fitting %s: fold %d of %d", name, k + 1, count)
            if trained[k].is_file():  # left by a run that was interrupted in a later fold
                load_strict(copied, load_state_dict(trained[k]), trained[k])
            else:
                fit(copied, train, np.concatenate([labelled[fold != k], unlabelled]), k)
                with atomic_path(trained[k]) as temporary:
                    torch.save(copied.state_dict(), temporary)
            held_out = labelled[fold == k]
            answers[held_out] = predict(copied, train, held_out)
            if len(unlabelled):
                others += _softmax(predict(copied, train, unlabelled)) / count
            if validation is not None and outside is not None:
                outside += _softmax(predict(copied, validation, np.arange(len(validation)))) / count
        if len(unlabelled):
            answers[unlabelled] = np.log(others.clip(1e-7))
        keep_answers(stores[0], answers)
        if outside is not None:
            keep_answers(stores[1], np.log(outside.clip(1e-7)))
        for path in trained:
            path.unlink(missing_ok=True)
    return stores[0], stores[1] if validation is not None else None


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()
