"""Cross-fitting: train on the run's own training split in folds, so that no image is answered by a net that saw it.

Whole networks are cross-fitted, and linear probes on a frozen teacher's cached features. A probe is a linear classifier
of grid cells (a 1x1 convolution), or of whole images by their pooled vectors, which are treated as maps of one cell;
each of several findings has its own. Out of fold answers are as good as they would be on new images.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.handlers import LrScheduleHandler
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.transforms import Compose, RandCropByPosNegLabeld, RandScaleIntensityd, RandShiftIntensityd, SpatialPadd
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from amkd_monai.cache.build import answers_store, images_of, keep_answers
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.splits import fold_of_groups
from amkd_monai.distillation import Distiller
from amkd_monai.distillation.interface import Calibration
from amkd_monai.distillation.losses import area_logits, as_map, one_hot_area, without_unlabelled
from amkd_monai.engines.trainer import DistillationTrainer, Recipe
from amkd_monai.networks.volume_student import VolumeStudent
from amkd_monai.storage import atomic_path
from amkd_monai.terminal import progress
from amkd_monai.weights import load_state_dict, load_strict, state_hash

logger = logging.getLogger("amkd_monai")

ANSWER_STRIDE = 2
"""Cross-fitted networks' answers are kept at half the image's side: at a quarter small targets are learned worse."""
PATCHES_PER_STEP = 2

CALIBRATED_ON = 256
"""Masks, evenly spread over the split, that a calibration is fitted on at most."""
LEAST_GROUPS = 5
"""Groups (patients) of which offsets are fitted: those of fewer would be their own."""
OFFSET_PENALTY = 0.03  # L2 penalty of offsets, divided by the number of groups: few speak for themselves

WEIGHT_DECAY = 1e-3  # L2 penalty of the probe of cells on standardised features
WEIGHT_DECAY_POOLED = 100.0  # of pooled vectors, divided by the number of images: there may be fewer than channels

Probe = Callable[[Tensor], Tensor]
"""From standardised features (B, C, h, w) to logits (B, classes, h, w), or (B, 2, F, 1) of findings."""


@dataclass(frozen=True)
class Method:
    """How the copies of a network are trained on samples of a dataset, and how they answer them."""

    fit: Callable[[nn.Module, DecodedDataset, np.ndarray, int], None]  # (network, dataset, indices, fold)
    # (network, dataset, n indices), returns logits (n, classes, h, w)
    predict: Callable[[nn.Module, DecodedDataset, np.ndarray], np.ndarray]
    key: dict[str, Any]  # what the answers depend on besides network, folds and seed
    title: str  # what is trained and for how long, for messages


def answer_size(dataset: DecodedDataset) -> tuple[int, int]:
    """Grid (h, w) at which cross-fitted answers are kept: one cell where an image has one class, (F, 1) of findings."""
    if dataset.classes is not None:
        return dataset.findings or 1, 1
    height, width = dataset.images.shape[-2:]
    return height // ANSWER_STRIDE, width // ANSWER_STRIDE


def fitted(network: nn.Module, path: Path, method: Method, *where: Any) -> nn.Module:
    """A trained copy of a network, read from the file that an earlier, perhaps interrupted, call left, or fitted.

    ``where`` are the other arguments of :attr:`Method.fit`.
    """
    copied = copy.deepcopy(network)
    if path.is_file():
        load_strict(copied, load_state_dict(path), path)
    else:
        method.fit(copied, *where)
        with atomic_path(path) as temporary:
            torch.save(copied.state_dict(), temporary)
    return copied


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
    network_key = {"network": state_hash(network.state_dict()), "folds": folds, "seed": seed, "labels": train.hashes}
    stores = [
        answers_store(name, {**method.key, **network_key, "of": of}, dataset, size, cache_dir)
        for of, dataset in zip(("train", "validation")[: len(sections)], sections, strict=True)
    ]
    if all(store.is_complete for store in stores):
        return stores
    labelled, unlabelled = np.flatnonzero(train.has_label), np.flatnonzero(~train.has_label)
    classes = None if train.classes is None else train.classes[labelled]
    fold = fold_of_groups([train.groups[i] for i in labelled], folds, seed, classes)
    count = int(fold.max()) + 1
    logits = np.zeros((len(train), train.num_classes, *size), dtype=np.float32)
    unseen = [(train, unlabelled), *((dataset, np.arange(len(dataset))) for dataset in sections[1:])]
    means = [np.zeros((len(rows), *logits.shape[1:]), dtype=np.float32) for _, rows in unseen]
    trained = [stores[0].directory.with_name(f"{stores[0].directory.name}-fold{k}.pt") for k in range(count)]
    seconds: list[float] = []
    for k in range(count):
        left = f"; about {np.mean(seconds) * (count - k) / 60:.1f} minutes left" if seconds else ""
        logger.info("cross-fitting %s, %s: fold %d of %d%s", name, method.title, k + 1, count, left)
        rows, is_new, started = np.concatenate([labelled[fold != k], unlabelled]), not trained[k].is_file(), time.time()
        copied = fitted(network, trained[k], method, train, rows, k)
        held_out = labelled[fold == k]
        logits[held_out] = method.predict(copied, train, held_out)
        for mean, (dataset, rows) in zip(means, unseen, strict=True):
            if len(rows):
                mean += torch.from_numpy(method.predict(copied, dataset, rows)).softmax(1).numpy() / count
        seconds += [time.time() - started] if is_new else []
    logits[unlabelled], *others = (np.log(mean.clip(1e-7)) for mean in means)
    for store, answers in zip(stores, (logits, *others), strict=True):
        keep_answers(store, answers)
    for path in trained:
        path.unlink(missing_ok=True)
    return stores


def of_students(recipe: Recipe, epochs: int, seed: int, device: torch.device | str, title: str) -> Method:
    """Train students, supervised, with the run's own recipe; answers (n, classes, H / 2, W / 2), or of images."""

    def fit(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray, fold: int) -> None:
        of_patches, distiller = isinstance(network, VolumeStudent), Distiller(network, batch_dice=recipe.batch_dice)
        distiller.to(device, memory_format=torch.preserve_format if of_patches else torch.channels_last)
        loader = recipe.loader(dataset, seed + fold, indices=indices, distributed=False)
        optimizer = recipe.optimizer(distiller)
        scheduler = recipe.scheduler(optimizer, epochs * len(loader))
        options: dict[str, Any] = {"augmentation": recipe.augment(), "seed": seed + fold}
        options["train_handlers"] = [LrScheduleHandler(scheduler, print_lr=False, epoch_level=False)]
        trainer = DistillationTrainer(device, epochs, loader, distiller, optimizer, **options)
        trainer.logger.setLevel(logging.WARNING)
        average = ModelEmaV3(network, recipe.ema, use_warmup=True) if recipe.ema else None
        with progress(total=epochs * len(loader), desc=f"{title}, training {fold + 1}") as bar:
            step = Events.ITERATION_COMPLETED
            trainer.add_event_handler(step, lambda _: bar.update(1))
            if average is not None:
                trainer.add_event_handler(step, lambda e: average.update(network, e.state.iteration))
            trainer.run()
        if average is not None:
            network.load_state_dict(average.module.state_dict())

    @torch.inference_mode()
    def predict(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray) -> np.ndarray:
        where = next(network.parameters()).device
        network.eval()
        if isinstance(network, VolumeStudent):
            return _answer_volumes(network, dataset, indices, (network.slices, *dataset.images.shape[-2:]), where)
        batches = (indices[start : start + 16].tolist() for start in range(0, len(indices), 16))
        answers = (as_map(network(images_of(dataset, rows, where))) for rows in batches)
        return np.concatenate([area_logits(logits, answer_size(dataset)).cpu().numpy() for logits in answers])

    own = {name: value for name, value in recipe.describe().items() if name != "first_stage"}  # needs teachers
    return Method(fit, predict, {"recipe": own, "epochs": epochs}, title)


def of_volumes(
    patch_size: Sequence[int], steps: int, learning_rate: float, seed: int, device: torch.device | str
) -> Method:
    """Train 3D networks on patches of whole volumes; a slice's answer is (classes, H / 2, W / 2) of its volume's."""
    kind = torch.device(device).type

    def fit(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray, fold: int) -> None:
        keys = ["image", "label"]
        crop = RandCropByPosNegLabeld(keys, "label", patch_size, pos=2, neg=1, num_samples=PATCHES_PER_STEP)
        light = RandScaleIntensityd("image", 0.15, 1.0), RandShiftIntensityd("image", 0.1, prob=1.0)
        patches = Compose([SpatialPadd(keys, patch_size), crop, *light])
        patches.set_random_state(seed + fold)
        volumes = [(image, label) for _, image, label in _volumes(dataset, indices[dataset.has_label[indices]])]
        network.to(device, memory_format=torch.channels_last_3d).train()
        loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        rng = np.random.default_rng([seed, fold])
        for _ in progress(range(steps), desc=f"volume specialist, fold {fold + 1}"):
            image, label = volumes[rng.integers(len(volumes))]
            batch = patches({"image": image, "label": label})
            x, y = (torch.stack([p[key] for p in batch]).as_subclass(Tensor).to(device) for key in keys)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(kind, dtype=torch.bfloat16):
                logits = network(x.contiguous(memory_format=torch.channels_last_3d))
            loss_function(*without_unlabelled(logits.float(), y)).backward()
            optimizer.step()
            scheduler.step()

    @torch.inference_mode()
    def predict(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray) -> np.ndarray:
        network.eval()
        with torch.autocast(kind, dtype=torch.bfloat16):
            return _answer_volumes(network, dataset, indices, patch_size, device)

    return Method(fit, predict, {"volume": [patch_size, steps, learning_rate]}, f"3D network of {steps} steps")


def _answer_volumes(
    network: nn.Module, dataset: DecodedDataset, indices: np.ndarray, patch: Sequence[int], device: torch.device | str
) -> np.ndarray:
    """Answers (n, classes, H / 2, W / 2) of a 3D network to slices, each from its whole volume, patch by patch."""
    answers: dict[int, np.ndarray] = {}
    for rows, image, _ in _volumes(dataset, indices):
        logits = sliding_window_inference(image[None].to(device), patch, 2, network, overlap=0.25)
        slices = logits[0].float().transpose(0, 1)  # (C, D, H, W) -> (D, C, H, W)
        slices = F.adaptive_avg_pool2d(slices, answer_size(dataset)).cpu().numpy()
        answers.update(zip(rows.tolist(), slices, strict=True))
    return np.stack([answers[int(i)] for i in indices])


def _volumes(dataset: DecodedDataset, indices: np.ndarray) -> Sequence[tuple[np.ndarray, Tensor, Tensor]]:
    """The volumes to which samples belong: indices of all slices, image (C, D, H, W) in [0, 1] and label."""
    found = []
    for case in dict.fromkeys(dataset.cases[i] for i in indices):
        rows = np.flatnonzero(np.asarray(dataset.cases) == case)
        slices = (array[rows[0] : rows[-1] + 1].swapaxes(0, 1) for array in (dataset.images, dataset.labels))
        image, label = (torch.from_numpy(np.array(part)) for part in slices)
        found.append((rows, image.float() / 255, label.long()))
    return found


def cell_targets(dataset: DecodedDataset, indices: np.ndarray, classes: int, size: tuple[int, int]) -> Tensor:
    """Area fractions of the classes in grid cells (N, classes, h, w), 0 where nothing is labelled."""
    batches = (np.array(dataset.labels[indices[start : start + 64]]) for start in range(0, len(indices), 64))
    maps = (labels if labels.ndim == 4 else labels.reshape(len(labels), 1, -1, 1) for labels in batches)
    return torch.cat([one_hot_area(torch.from_numpy(label), classes, size) for label in maps])


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int, history: int) -> None:
    """Minimise a loss by L-BFGS in at most ``steps`` iterations."""
    optimiser = torch.optim.LBFGS(parameters, max_iter=steps, history_size=history, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


def fit_probes(features: Tensor, targets: Tensor, weight_decay: float) -> Probe:
    """Fit a probe of the classes, or where targets (N, 2, F, 1) are of more cells than features, one of each cell."""
    cells = [targets] if features.shape[-2:] == targets.shape[-2:] else targets.split(1, 2)
    fitted = [fit_probe(features, cell, weight_decay=weight_decay) for cell in cells]
    return lambda features: torch.cat([probe(features) for probe in fitted], 2)


def fit_probe(features: Tensor, targets: Tensor, steps: int = 40, weight_decay: float = WEIGHT_DECAY) -> Probe:
    """Fit multinomial logistic regression of class fractions (N, classes, h, w) on standardised (N, C, h, w)."""
    x = features.permute(0, 2, 3, 1).flatten(0, 2)  # (N, C, h, w) -> (cells, C)
    y = targets.permute(0, 2, 3, 1).flatten(0, 2)
    classes = y.shape[1]
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = y.mean(0).clamp_min(1e-4).log().requires_grad_(True)

    def loss() -> Tensor:
        fit = -(y * F.log_softmax(F.linear(x, weight, bias), dim=1)).sum(1).mean()
        return fit + weight_decay * weight.square().sum()

    _minimise([weight, bias], loss, steps, 10)
    fitted, offset = weight.detach(), bias.detach()[:, None, None]
    return lambda features: torch.einsum("kc,bchw->bkhw", fitted, features) + offset


def cross_fit_probes(
    store: FeatureStore,
    dataset: DecodedDataset,
    mean: Tensor,
    std: Tensor,
    folds: int = 5,
    seed: int = 0,
    array: str = "grid",
) -> tuple[np.ndarray, list[Probe]]:
    """Answer every training sample by a probe that has not seen its group, unlabelled ones by the mean of all probes.

    ``array``, ``grid`` or ``pooled``, has features of ``mean`` and ``std`` (C,). Returns logits (N, classes, h, w)
    float32, out of fold for labelled samples, and the probes of all folds.
    """
    labelled = np.flatnonzero(dataset.has_label)
    classes = None if dataset.classes is None else dataset.classes[labelled]
    fold = fold_of_groups([dataset.groups[i] for i in labelled], folds, seed, classes)
    features = standardised(store, labelled, mean, std, array)
    size = (dataset.findings or features.shape[-2], features.shape[-1])
    targets = cell_targets(dataset, labelled, dataset.num_classes, size)
    answers = np.zeros((len(dataset), dataset.num_classes, *size), dtype=np.float32)
    probes = []
    for k in range(int(fold.max()) + 1):
        inside = torch.from_numpy(np.flatnonzero(fold != k))
        outside = np.flatnonzero(fold == k)
        decay = WEIGHT_DECAY_POOLED / len(inside) if array == "pooled" else WEIGHT_DECAY
        probe = fit_probes(features[inside], targets[inside], decay)
        answers[labelled[outside]] = probe(features[torch.from_numpy(outside)]).numpy()
        probes.append(probe)
    if len(unlabelled := np.flatnonzero(~dataset.has_label)):
        answers[unlabelled] = answer_of_probes(store, unlabelled, mean, std, probes, array)
    return answers, probes


def answer_of_probes(
    store: FeatureStore, indices: np.ndarray, mean: Tensor, std: Tensor, probes: list[Probe], array: str = "grid"
) -> np.ndarray:
    """Mean answer of several probes as log-probabilities (N, classes, h, w), for samples that none of them has seen."""
    features = standardised(store, indices, mean, std, array)
    return torch.stack([p(features).softmax(1) for p in probes]).mean(0).clamp_min(1e-7).log().numpy()


def standardised(store: FeatureStore, indices: np.ndarray, mean: Tensor, std: Tensor, array: str = "grid") -> Tensor:
    """Read features (N, C, h, w), pooled ones as one cell, as float32 with mean 0 and deviation 1 per channel."""
    features = torch.from_numpy(_read_maps(store, array, indices)).float()
    return (features - mean[:, None, None]) / std[:, None, None]


def _read_maps(store: FeatureStore, array: str, indices: np.ndarray | range) -> np.ndarray:
    """Read features as maps (N, C, h, w), vectors (C,) as maps of one cell; pooled vectors may be means of the grid."""
    if array == "pooled" and array not in store.arrays:
        return store.read("grid", indices).astype(np.float32).mean((2, 3), keepdims=True)
    values = store.read(array, indices)
    return values[:, :, None, None] if values.ndim == 2 else values


def channel_statistics(store: FeatureStore, array: str = "grid") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the cached features over all samples and cells."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(store), 64):
        batch = _read_maps(store, array, range(len(store))[start : start + 64]).astype(np.float64)
        count += batch[:, 0].size
        total = total + batch.sum((0, 2, 3))
        squares = squares + np.square(batch).sum((0, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(std > 1e-6, std, 1.0)).float()


def calibrated_on(count: int) -> np.ndarray:
    """Which of so many masks a calibration is fitted on: all, or :data:`CALIBRATED_ON`, evenly spread."""
    return np.linspace(0, count - 1, min(count, CALIBRATED_ON)).astype(int)


def fit_calibration(logits: Tensor, targets: Tensor, groups: int = 0) -> Calibration:
    """The temperature in [0.25, 8] that minimises the cross entropy of the answers (Guo et al., 2017).

    Of ``groups`` patients or images, at least :data:`LEAST_GROUPS`, also one offset in [-4, 4] for each class but the
    first (Platt, 1999), with an L2 penalty: what few labels taught draws too little or too much. A class without target
    keeps 0, and all do where offsets would lower the mean Dice: the likeliest answer of one that knows little is
    background. Logits and targets, fractions of the classes, are (N, classes, h, w); cells whose fractions are all 0
    don't count.
    """
    offsets = groups >= LEAST_GROUPS
    log_temperature = torch.zeros((), requires_grad=True)
    shift = torch.zeros(logits.shape[1], requires_grad=offsets)
    free = (targets.sum((0, 2, 3)) > 0) & (torch.arange(len(shift)) > 0)

    def loss() -> Tensor:
        scaled = logits / log_temperature.exp() + (shift * free)[:, None, None]
        fit = -(targets * F.log_softmax(scaled, dim=1)).sum(1).mean()
        return fit + OFFSET_PENALTY / max(groups, 1) * shift.square().sum()

    _minimise([log_temperature, *([shift] if offsets else [])], loss, 50, 100)
    log_temperature = log_temperature.detach().clamp(math.log(0.25), math.log(8.0))
    if offsets:
        _minimise([shift], loss, 50, 100)  # those of a temperature at the end of its range
    own = (shift.detach() * free).clamp(-4, 4)
    fitted = Calibration(float(log_temperature.exp()), tuple(own.tolist()) if offsets else ())
    if offsets and _mean_dice(fitted(logits), targets) < _mean_dice(logits, targets):
        return fit_calibration(logits, targets)
    return fitted


def _mean_dice(logits: Tensor, targets: Tensor) -> float:
    """Mean Dice of the likeliest classes over images and the foreground classes that they show."""
    known = targets.sum(1, keepdim=True) > 0
    drawn = F.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1) * known
    both, true = (drawn * targets).sum((2, 3))[:, 1:], targets.sum((2, 3))[:, 1:]
    dice = 2 * both / (drawn.sum((2, 3))[:, 1:] + true).clamp_min(1e-6)
    return float(dice[true > 0].mean()) if (true > 0).any() else 0.0
