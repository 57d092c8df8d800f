"""A 3D network as a specialist teacher, trained on the run's own volumes in folds."""

from __future__ import annotations

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.transforms import Compose, RandCropByPosNegLabeld, RandScaleIntensityd, RandShiftIntensityd, SpatialPadd
from torch import nn

from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.distillation.losses import without_unlabelled
from amkd_monai.engines.crossfit import Fit, answer_size
from amkd_monai.terminal import progress

PATCHES_PER_STEP = 2


def _volume(dataset: DecodedDataset, case: str) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Return the sample indices, image (1, D, H, W) in [0, 1] and label (1, D, H, W) of a volume."""
    rows = np.flatnonzero(np.asarray(dataset.cases) == case)
    image = torch.from_numpy(np.array(dataset.images[rows[0] : rows[-1] + 1, 0])).float()[None] / 255
    label = torch.from_numpy(np.array(dataset.labels[rows[0] : rows[-1] + 1, 0])).long()[None]
    return rows, image, label


def _cases(dataset: DecodedDataset, indices: np.ndarray) -> list[str]:
    return list(dict.fromkeys(dataset.cases[i] for i in indices))


def fit_volumes(
    patch_size: tuple[int, int, int], steps: int, learning_rate: float, seed: int, device: torch.device | str
) -> Fit:
    """Return a function that trains a 3D network on patches of the volumes to which some samples belong."""

    def fit(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray, fold: int) -> None:
        keys = ["image", "label"]
        crop = RandCropByPosNegLabeld(
            keys, label_key="label", spatial_size=patch_size, pos=2, neg=1, num_samples=PATCHES_PER_STEP
        )
        patches = Compose(
            [
                SpatialPadd(keys, patch_size),
                crop,
                RandScaleIntensityd("image", 0.15, 1.0),
                RandShiftIntensityd("image", 0.1, prob=1.0),
            ]
        )
        patches.set_random_state(seed + fold)
        labelled = indices[dataset.has_label[indices]]
        volumes = [_volume(dataset, case)[1:] for case in _cases(dataset, labelled)]
        network.to(device, memory_format=torch.channels_last_3d).train()
        loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        rng = np.random.default_rng([seed, fold])
        for _ in progress(range(steps), desc=f"volume specialist, fold {fold + 1}"):
            image, label = volumes[rng.integers(len(volumes))]
            batch = patches({"image": image, "label": label})
            x = torch.stack([p["image"] for p in batch]).as_subclass(torch.Tensor).to(device)
            y = torch.stack([p["label"] for p in batch]).as_subclass(torch.Tensor).to(device)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                logits = network(x.contiguous(memory_format=torch.channels_last_3d))
            loss_function(*without_unlabelled(logits.float(), y)).backward()
            optimizer.step()
            scheduler.step()

    return fit


def predict_volumes(patch_size: tuple[int, int, int], device: torch.device | str):
    """Return a function that answers samples (slices) from their whole volumes: (n, classes, H / 4, W / 4)."""

    @torch.inference_mode()
    def predict(network: nn.Module, dataset: DecodedDataset, indices: np.ndarray) -> np.ndarray:
        network.eval()
        size = answer_size(dataset)
        answers: dict[int, np.ndarray] = {}
        for case in _cases(dataset, indices):
            rows, image, _ = _volume(dataset, case)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                logits = sliding_window_inference(image[None].to(device), patch_size, 2, network, overlap=0.25)
            slices = logits[0].float().transpose(0, 1)  # (C, D, H, W) -> (D, C, H, W)
            slices = nn.functional.adaptive_avg_pool2d(slices, size).cpu().numpy()
            answers.update(zip(rows.tolist(), slices, strict=True))
        return np.stack([answers[int(i)] for i in indices])

    return predict
