"""Run a frozen teacher once over a dataset and keep what it says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from amkd_monai.cache.shards import ArraySpec
from amkd_monai.cache.store import FeatureStore, store_directory
from amkd_monai.data.content import fingerprint
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.teachers.base import Teacher, TeacherFeatures

logger = logging.getLogger("amkd_monai")


def images_of(dataset: DecodedDataset, indices: range, device: torch.device | str) -> Tensor:
    """Stack images (B, 3, H, W) in [0, 1]."""
    stacked = np.stack([dataset.image(i) for i in indices])
    return torch.from_numpy(stacked).to(device).float() / 255


def labels_of(dataset: DecodedDataset, indices: range, device: torch.device | str) -> Tensor:
    """Stack labels (B, 1, H, W), 255 where unlabelled."""
    return torch.from_numpy(np.stack([dataset.labels[i] for i in indices])).to(device)


def _ask(teacher: Teacher, dataset: DecodedDataset, indices: range, device: torch.device | str) -> dict:
    image = images_of(dataset, indices, device)
    said = teacher(image, labels_of(dataset, indices, device)) if teacher.uses_labels else teacher(image)
    return _arrays(said)


def _arrays(features: TeacherFeatures) -> dict[str, np.ndarray]:
    found = {"grid": features.grid, "pooled": features.pooled, "logits": features.logits}
    return {name: value.float().cpu().numpy() for name, value in found.items() if value is not None}


@torch.inference_mode()
def cache_teacher(
    teacher: Teacher,
    dataset: DecodedDataset,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
) -> FeatureStore:
    """Return the store of a teacher's outputs over a dataset, computing only what is still missing.

    One view is stored, the image as it is; the store's format carries several.

    Args:
        teacher: frozen teacher.
        dataset: decoded images; sample i of the store is sample i of the dataset.
        cache_dir: folder of the stores.
        device: where the teacher runs.
        batch_size: images per forward.

    Raises:
        ValueError: a teacher's output is not finite (the sample is named).
    """
    key: dict[str, Any] = {
        "teacher": teacher.fingerprint,
        "preprocessing": teacher.preprocessing(),
        "views": ["identity"],
        "samples": fingerprint(dataset.ids, dataset.hashes),
        "decoded": dataset.directory.name,  # covers the transform chain, which the files' hashes don't
        "size": list(dataset.images.shape[-2:]),
    }
    teacher.to(device)
    example = _ask(teacher, dataset, range(1), device)
    arrays = {name: ArraySpec(value.shape[1:], "float16") for name, value in example.items()}
    directory = store_directory(cache_dir, teacher.name, key)
    store = FeatureStore.create_or_open(
        directory, key, dataset.ids, dataset.hashes, arrays, shard_size=128, view_parameters=[{"view": "identity"}]
    )
    if not store.is_complete:
        with store.building(wait_s=3600), tqdm(total=len(dataset), desc=f"teacher {teacher.name}", disable=None) as bar:
            missing = store.missing()
            bar.update(len(dataset) - sum(len(store.samples_of(shard)) for _, shard in missing))
            for view, shard in missing:
                samples = store.samples_of(shard)
                parts = []
                for first in range(samples.start, samples.stop, batch_size):
                    batch = range(first, min(first + batch_size, samples.stop))
                    parts.append(_ask(teacher, dataset, batch, device))
                    bar.update(len(batch))
                store.write_shard(view, shard, {n: np.concatenate([p[n] for p in parts]) for n in arrays})
    return store


def answers_store(
    name: str, key: Mapping[str, Any], dataset: DecodedDataset, size: tuple[int, int], cache_dir: str | Path
) -> FeatureStore:
    """Open the store of answers (N, classes, h, w) that are computed for a whole dataset at once.

    Probes and cross-fitted networks answer this way; see :func:`keep_answers`.
    """
    key = {**key, "samples": fingerprint(dataset.ids, dataset.hashes), "decoded": dataset.directory.name}
    arrays = {"logits": ArraySpec((dataset.num_classes, *size), "float16")}
    directory = store_directory(cache_dir, f"{name}-answers", key)
    return FeatureStore.create_or_open(directory, key, dataset.ids, dataset.hashes, arrays, shard_size=128)


def keep_answers(store: FeatureStore, logits: np.ndarray) -> None:
    """Write answers (N, classes, h, w) into their store; what is there already stays."""
    with store.building(wait_s=600):
        for view, shard in store.missing():
            store.write_shard(view, shard, {"logits": logits[np.asarray(store.samples_of(shard))]})
