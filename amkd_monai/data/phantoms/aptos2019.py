"""Fundus photographs with lesions by grade, painted: a demonstration, never a result."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from amkd_monai.data.phantoms.tools import grain, writer

SHARES = (0.34, 0.16, 0.24, 0.12, 0.14)
"""Of the grades: rarer where the disease is severe, but enough of each for a short run."""
LESIONS = {
    "microaneurysms": ((0, 0), (2, 5), (8, 16), (18, 30), (14, 30)),
    "haemorrhages": ((0, 0), (0, 0), (2, 5), (8, 14), (7, 14)),
    "exudates": ((0, 0), (0, 0), (2, 8), (6, 16), (6, 18)),
    "new_vessels": ((0, 0), (0, 0), (0, 0), (0, 0), (3, 5)),
}
"""Fewest and most lesions of a kind by grade."""


@writer("aptos2019")
def write_aptos2019(folder: Path, count: int = 75, unlabelled: int = 6, height: int = 180, seed: int = 0) -> None:
    """Write photographs in the original layout: `train.csv`, `train_images`, `test.csv`, `test_images`.

    Args:
        folder: an empty folder.
        count: number of graded photographs.
        unlabelled: number of those in `test_images`.
        height: about the height in pixels; photographs are wider than high and have black borders.
        seed: seed of all draws.
    """
    from PIL import Image

    shares = np.round(np.cumsum(SHARES) * count).astype(int)
    grades = np.repeat(np.arange(5), np.diff([0, *shares[:-1], count]))
    rows: dict[str, list[list[object]]] = {"train": [], "test": []}
    for index in range(count + unlabelled):
        rng = np.random.default_rng([seed, index])
        section = "train" if index < count else "test"
        grade = int(grades[index]) if index < count else int(rng.integers(5))
        name = "".join(rng.choice(list("0123456789abcdef"), 12))
        (folder / f"{section}_images").mkdir(exist_ok=True)
        Image.fromarray(_photograph(rng, grade, height)).save(folder / f"{section}_images" / f"{name}.png")
        rows[section].append([name, grade] if section == "train" else [name])
    for section, header in (("train", ["id_code", "diagnosis"]), ("test", ["id_code"])):
        with (folder / f"{section}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *sorted(rows[section], key=str)])


def _photograph(rng: np.random.Generator, grade: int, height: int) -> np.ndarray:
    """Paint one eye as (H, W, 3) uint8."""
    h = int(height * rng.uniform(0.9, 1.1))
    w = int(h * rng.uniform(1.25, 1.5))
    radius = h * rng.uniform(0.47, 0.54)
    y, x = np.mgrid[:h, :w].astype(float)
    y, x = (y - h / 2) / radius, (x - w / 2 - rng.uniform(-0.05, 0.05) * w) / radius  # the disc has radius 1
    base = np.array([0.78, 0.40, 0.20]) * rng.uniform(0.8, 1.15) + rng.normal(0, 0.02, 3)
    shade = 1 - 0.35 * (x**2 + y**2) + 0.10 * grain(rng, (h, w), h / 8) + 0.03 * grain(rng, (h, w), 2.0)
    image = base * shade[..., None]

    side = rng.choice([-1, 1])  # right or left eye
    nerve, macula = (side * 0.55, rng.normal(0, 0.04)), (-side * 0.1, rng.normal(0, 0.04))
    image += 0.4 * _spot(x, y, nerve, 0.13)[..., None] * np.array([1, 0.9, 0.6])
    image *= 1 - 0.35 * _spot(x, y, macula, 0.16)[..., None]
    for sign in (-1, 1):
        for reach in rng.uniform(0.25, 0.95, 4):
            _vessel(image, rng, x, y, nerve, (-side * reach, sign * rng.uniform(0.3, 0.9)), 0.018)

    def places(kind: str) -> list[tuple[float, float]]:
        low, high = LESIONS[kind][grade]
        angle = rng.uniform(0, 2 * np.pi, rng.integers(low, high + 1))
        distance = 0.85 * np.sqrt(rng.uniform(0.02, 1, len(angle)))
        return list(zip(distance * np.cos(angle), distance * np.sin(angle), strict=True))

    for place in places("microaneurysms"):
        _stain(image, _spot(x, y, place, rng.uniform(0.018, 0.026)), (0.30, 0.03, 0.03), 0.9)
    for place in places("haemorrhages"):
        blot = _spot(x * rng.uniform(0.7, 1.3), y, place, rng.uniform(0.045, 0.09))
        _stain(image, np.clip(blot * (1 + 0.4 * grain(rng, (h, w), 2.0)), 0, 1), (0.22, 0.02, 0.03), 0.95)
    for place in places("exudates"):
        _stain(image, _spot(x, y, place, rng.uniform(0.025, 0.05)), (0.98, 0.90, 0.50), 0.95)
    for place in places("new_vessels"):
        for _ in range(6):  # a tuft
            _vessel(image, rng, x, y, place, tuple(np.array(place) + rng.normal(0, 0.12, 2)), 0.012)
    image += rng.normal(0, 0.012, image.shape)
    image *= (x**2 + y**2 < 1)[..., None]
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _spot(x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radius: float) -> np.ndarray:
    return np.exp(-((((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius**2) ** 2))


def _stain(image: np.ndarray, cover: np.ndarray, colour: tuple[float, float, float], strength: float) -> None:
    image += strength * cover[..., None] * (np.array(colour) - image)


def _vessel(
    image: np.ndarray,
    rng: np.random.Generator,
    x: np.ndarray,
    y: np.ndarray,
    start: tuple[float, ...],
    end: tuple[float, ...],
    width: float,
) -> None:
    """Darken the image along a bent line that gets thinner."""
    begin, finish = np.array(start), np.array(end)
    bend = (begin + finish) / 2 + rng.normal(0, 0.12, 2)
    cover = np.zeros_like(x)
    for t in np.linspace(0, 1, 28):
        px, py = (1 - t) ** 2 * begin + 2 * t * (1 - t) * bend + t**2 * finish
        reach = width * (1.3 - t)
        cover = np.maximum(cover, np.exp(-(((x - px) ** 2 + (y - py) ** 2) / (2 * reach**2))))
    image *= 1 - 0.45 * cover[..., None]
