"""Deterministic weights and inputs, and the measure by which outputs are compared with recorded ones.

A tensor is filled from its key in the official layout: u in [-1, 1) comes from splitmix64, seeded by the CRC-32 of the
key, and is scaled by what the key and shape say the tensor is. The recorded outputs were made by the teachers' own
code (named in each ``.goldenA.json``) under the same fill.
"""

import json
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SAMPLE_STEP, SAMPLES = 2654435761, 64
MASK = 2**64 - 1


def keys(name):
    """{key: shape} of a checkpoint in the official layout."""
    return {key: tuple(shape) for key, shape in json.loads((FOLDER / f"{name}.keys.json").read_text()).items()}


def golden(name):
    """{output: {shape, mean, std, samples}} recorded for input A."""
    return json.loads((FOLDER / f"{name}.goldenA.json").read_text())["outputs"]


BLOCK = 2**16
"""Values made at a time: what stays in the processor's cache is several times faster."""


def uniform(key, start, count):
    """Multiples of 2**-23 in [-1, 1), float64: the values of a key from a place on."""
    golden_ratio, crc = 0x9E3779B97F4A7C15, zlib.crc32(key.encode())
    with np.errstate(over="ignore"):
        state = np.arange(start, start + count, dtype=np.uint64)
        state *= np.uint64(golden_ratio)
        state += np.uint64((crc * 0xD1B54A32D192ED03 + golden_ratio) & MASK)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state ^= state >> np.uint64(shift)
            state *= np.uint64(factor)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def tensor(key, shape):
    """The float32 value of one checkpoint entry."""
    count, last = int(np.prod(shape)), key.split(".")[-1]
    values = np.empty(count, dtype=np.float32)
    for start in range(0, count, BLOCK):
        u = uniform(key, start, min(BLOCK, count - start))
        if last == "running_var":
            value = 1 + 0.5 * np.abs(u)
        elif last == "running_mean":
            value = 0.1 * u
        elif last in ("gamma", "gamma_1", "gamma_2"):
            value = 0.5 + 0.25 * u
        elif len(shape) < 2:
            value = 0.1 * u + (last == "weight")
        elif shape[0] == 1:
            value = 0.5 * u
        else:
            value = u * np.sqrt(3 / np.prod(shape[1:]))
        values[start : start + BLOCK] = value
    return values.reshape(shape)


def pattern(size):
    """Input A, (3, size, size) float64 in [0, 1]: every value is a 256th step."""
    c, y, x = np.indices((3, size, size))
    return ((7 * y + 13 * x + 29 * c + x * y // 16) % 256) / 255


def noise(size):
    """Input B, (3, size, size) float64 in [0, 1)."""
    return (uniform("input-B", 0, 3 * size * size).reshape(3, size, size) + 1) / 2


def normalised(pixels):
    """(1, 3, H, W) float32 by ImageNet's statistics, computed in float64."""
    return ((pixels - MEAN[:, None, None]) / STD[:, None, None]).astype(np.float32)[None]


def difference(recorded, output):
    """Largest deviation of 64 samples, mean and standard deviation, in units of the recorded standard deviation."""
    output = np.asarray(output, dtype=np.float32)
    assert list(output.shape) == recorded["shape"], (output.shape, recorded["shape"])
    flat = output.ravel().astype(np.float64)
    picked = flat[[(j * SAMPLE_STEP) % flat.size for j in range(min(SAMPLES, flat.size))]]
    deviations = [
        np.abs(picked - recorded["samples"]).max(),
        abs(flat.mean() - recorded["mean"]),
        abs(flat.std() - recorded["std"]),
    ]
    return float(max(deviations)) / (recorded["std"] if flat.size > 1 and recorded["std"] > 0 else 1.0)
