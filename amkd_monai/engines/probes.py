"""Linear probes on a frozen teacher's cached features, statistics of features, and the calibration of outputs.

A probe is a linear classifier of grid cells (a 1x1 convolution), or of whole images by their pooled vectors, which are
treated as maps of one cell; each of several findings has its own. It is cross-fitted: each image is answered by a probe
that has seen no image of its group, so that its answers are as good as they would be on new images.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.splits import fold_of_groups
from amkd_monai.distillation.interface import Calibration
from amkd_monai.distillation.losses import label_map, one_hot_area

CALIBRATED_ON = 256
"""Masks, evenly spread over the split, that a calibration is fitted on at most."""
LEAST_GROUPS = 5
"""Groups (patients) of which offsets are fitted: those of fewer would be their own."""
OFFSET_PENALTY = 0.03  # L2 penalty of offsets, divided by the number of groups: few speak for themselves

WEIGHT_DECAY = 1e-3  # L2 penalty of the probe of cells on standardised features
WEIGHT_DECAY_POOLED = 100.0  # of pooled vectors, divided by the number of images: there may be fewer than channels

Probe = Callable[[Tensor], Tensor]
"""From standardised features (B, C, h, w) to logits (B, classes, h, w), or (B, 2, F, 1) of findings."""


def cell_targets(dataset: DecodedDataset, indices: np.ndarray, classes: int, size: tuple[int, int]) -> Tensor:
    """Area fractions of the classes in grid cells (N, classes, h, w), 0 where nothing is labelled."""
    batches = (np.array(dataset.labels[indices[start : start + 64]]) for start in range(0, len(indices), 64))
    return torch.cat([one_hot_area(label_map(torch.from_numpy(labels)), classes, size) for labels in batches])


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int, history: int) -> None:
    """Minimise a loss by L-BFGS in at most ``steps`` iterations."""
    optimiser = torch.optim.LBFGS(parameters, max_iter=steps, history_size=history, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


def fit_probe(features: Tensor, targets: Tensor, weight_decay: float = WEIGHT_DECAY, steps: int = 40) -> Probe:
    """Fit multinomial logistic regression of class fractions (N, classes, h, w) on standardised (N, C, h, w).

    Where targets (N, 2, F, 1) are of more cells than features, one is fitted of each cell.
    """
    if features.shape[-2:] != targets.shape[-2:]:
        fitted_cells = [fit_probe(features, cell, weight_decay, steps) for cell in targets.split(1, 2)]
        return lambda features: torch.cat([probe(features) for probe in fitted_cells], 2)
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
        probe = fit_probe(features[inside], targets[inside], decay)
        answers[labelled[outside]] = probe(features[torch.from_numpy(outside)]).numpy()
        probes.append(probe)
    if len(unlabelled := np.flatnonzero(~dataset.has_label)):
        answers[unlabelled] = answer(store, unlabelled, mean, std, probes, array)
    return answers, probes


def answer(
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


def fit_calibration(logits: Tensor, targets: Tensor, groups: int = 0, prior: np.ndarray | None = None) -> Calibration:
    """The temperature in [0.25, 8] that minimises the cross entropy of the answers (Guo et al., 2017).

    It brings answers nearer to ``prior``, the frequencies (classes,) or (2, F) of the classes in what taught them, None
    if these were equal: one that knows nothing of an image knows how often a class occurs.

    Of ``groups`` patients or images, at least :data:`LEAST_GROUPS`, also one offset in [-4, 4] for each class but the
    first (Platt, 1999), with an L2 penalty: what few labels taught draws too little or too much. A class without target
    keeps 0, and all do where offsets would lower the mean Dice: the likeliest answer of one that knows little is
    background. Logits and targets, fractions of the classes, are (N, classes, h, w); cells whose fractions are all 0
    don't count.
    """
    centre = torch.zeros(logits.shape[1], 1, 1)
    if prior is not None:
        centre = torch.from_numpy(np.log(prior)).float().view(logits.shape[1], -1, 1)
    offsets = groups >= LEAST_GROUPS
    log_temperature = torch.zeros((), requires_grad=True)
    shift = torch.zeros(logits.shape[1], requires_grad=offsets)
    free = (targets.sum((0, 2, 3)) > 0) & (torch.arange(len(shift)) > 0)

    def loss() -> Tensor:
        scaled = (logits - centre) / log_temperature.exp() + centre + (shift * free)[:, None, None]
        fit = -(targets * F.log_softmax(scaled, dim=1)).sum(1).mean()
        return fit + OFFSET_PENALTY / max(groups, 1) * shift.square().sum()

    _minimise([log_temperature, *([shift] if offsets else [])], loss, 50, 100)
    log_temperature = log_temperature.detach().clamp(math.log(0.25), math.log(8.0))
    if offsets:
        _minimise([shift], loss, 50, 100)  # those of a temperature at the end of its range
    temperature = float(log_temperature.exp())
    own = (shift.detach() * free).clamp(-4, 4)[:, None, None] + centre * (1 - 1 / temperature)
    fitted = Calibration(temperature, () if prior is None and not offsets else tuple(own.flatten().tolist()))
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
