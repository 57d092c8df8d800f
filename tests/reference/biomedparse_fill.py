"""Weights, inputs and comparison of the BiomedParse reference figures.

Every value of a checkpoint is a hash of its key and its place: ``u`` is the splitmix64 finaliser of
``(crc32(key) << 32) + place + 0x9E3779B97F4A7C15`` mapped to [-1, 1), and a value is ``base + scale * u``.
The figures in ``biomedparse.goldenA.json`` are what the authors' code (github.com/microsoft/BiomedParse, 750eb40)
answers with these weights; ``biomedparse.keys.json`` lists every key of their checkpoint with its shape.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
BLOCK = 2**16
"""Values made at a time: what stays in the processor's cache is several times faster."""
KEYS = {key: tuple(shape) for key, shape in json.loads((HERE / "biomedparse.keys.json").read_text()).items()}
GOLDEN = json.loads((HERE / "biomedparse.goldenA.json").read_text())
TABLES = (
    "token_embedding.weight",
    "positional_embedding",
    "query_feat.weight",
    "query_embed.weight",
    "level_embed.weight",
    "pn_indicator.weight",
    "spatial_embed.weight",
    "spatial_featured.weight",
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
)


def spread(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Base and scale of a tensor's values."""
    if not shape:
        return 1.0, 0.1
    if len(shape) == 1:
        if key.split(".")[-1] in ("gamma_1", "gamma_2"):
            return 0.5, 0.25
        return (1.0, 0.1) if key.endswith("weight") else (0.0, 0.05)
    if key.endswith(TABLES):
        return 0.0, 1.0
    return 0.0, math.sqrt(3.0 * shape[0] / math.prod(shape))


def filled(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    count, (base, scale) = math.prod(shape), spread(key, shape)
    first = (zlib.crc32(key.encode()) << 32) + 0x9E3779B97F4A7C15
    values = np.empty(count, dtype=np.float32)
    for start in range(0, count, BLOCK):
        z = np.arange(min(BLOCK, count - start), dtype=np.uint64) + np.uint64((first + start) % 2**64)  # wraps around
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        unit = (z >> np.uint64(11)) * 2.0**-52 - 1.0
        values[start : start + BLOCK] = base + scale * unit
    return torch.from_numpy(values.reshape(shape))


def image_a(height: int = 256, width: int = 256) -> np.ndarray:
    """The picture of the reference figures, uint8 (height, width, 3)."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((3 * x + 5 * y + x * y // 16 + 41 * c) % 256).astype(np.uint8)


def gap(value: torch.Tensor, golden: dict) -> float:
    """Largest difference of mean, standard deviation and 64 samples, in units of the golden standard deviation."""
    assert list(value.shape) == golden["shape"], (tuple(value.shape), golden["shape"])
    flat = value.detach().flatten().double().numpy()
    places = [(j * 2654435761 + 12345) % flat.size for j in range(64)]
    differences = [abs(flat.mean() - golden["mean"]), abs(flat.std() - golden["std"])]
    differences += np.abs(flat[places] - np.asarray(golden["samples"])).tolist()
    return max(differences) / golden["std"]


def tolerance(name: str) -> float:
    """What rounding explains: the authors' code differs from itself by ``upstream_noise`` on other kernels."""
    return max(1e-4, 3 * GOLDEN["upstream_noise"][name])
