"""Check a store: its files against their hashes, and a sample of its images against the teacher itself."""

from __future__ import annotations

import numpy as np

from amkd_monai.cache.build import MATRIX, ask
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedImages
from amkd_monai.teachers.base import build_teacher

LARGEST_DIFFERENCE = 0.045
"""Largest relative difference of an array that passes, |stored - computed| / |computed|: a cosine of about 0.999."""


def verify_store(
    store: FeatureStore, fraction: float = 0.01, device: str = "cpu", weights_dir: str | None = None
) -> tuple[list[str], str]:
    """Check one store; its teacher runs again on a ``fraction`` of the samples, spread over the list, at least one.

    Returns:
        What is wrong, one sentence each, and what was compared or why not.
    """
    damaged = store.verify()
    faults = [f"{fault}: delete it to compute it anew" for fault in damaged.values()]
    description = store.origin.get("teacher")
    if description is None:
        return faults, "checksums alone: how its teacher is built is not recorded"
    folder = store.directory.parent / str(store.key["decoded"])
    if not (folder / "index.json").is_file():
        return faults, f"checksums alone: its decoded images, {folder.name}, are gone"
    try:
        teacher = build_teacher(description, weights_dir).to(device)
    except (ValueError, RuntimeError, OSError) as error:
        return faults, f"checksums alone: its teacher cannot be built here ({error})"
    if teacher.fingerprint != store.key["teacher"]:
        return [*faults, "stale: the weights or the preprocessing of its teacher changed since"], "checksums"
    spread = np.linspace(0, len(store) - 1, max(1, round(len(store) * fraction))).round().astype(int).tolist()
    whole = store.written() - set(damaged)
    samples = [(v, i) for v in range(store.views) for i in spread if (v, i // store.shard_size) in whole]
    decoded = DecodedImages(folder)
    for view, index in samples:
        matrices = store.read(MATRIX, [index], view) if view else None
        for name, computed in ask(teacher, decoded, [index], device, matrices).items():
            stored = store.read(name, [index], view).astype(np.float32)
            difference = float(np.linalg.norm(stored - computed) / max(float(np.linalg.norm(computed)), 1e-12))
            if not difference <= LARGEST_DIFFERENCE:
                faults.append(
                    f"{name} of image {store.sample_ids[index]!r}, view {view}, differs by {difference:.3f} of its "
                    "norm from the teacher's output: delete the store's folder to compute it again"
                )
    return faults, f"checksums, and {len(samples)} of {len(store) * store.views} images computed again"
