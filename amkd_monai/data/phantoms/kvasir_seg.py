"""Colonoscopy-like frames with polyps of the mucosa's own colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amkd_monai.data.phantoms.tools import blur, smooth_noise, writer


@writer("kvasir_seg")
def write_kvasir_seg(folder: Path, count: int = 40, size: tuple[int, int] = (150, 230), seed: int = 0) -> None:
    """Write polyp frames as `Kvasir-SEG/{images,masks}/<id>.jpg`.

    Frames show mottled mucosa with folds, vessels and highlights in a vignette with black corners; the polyp
    is a shaded bump of nearly the same colour. Masks are RGB JPEGs and ring at their edges, as the real ones.

    Args:
        folder: an empty folder.
        count: number of frames.
        size: smallest and largest side in pixels; no frame is square.
        seed: seed of all draws.
    """
    from PIL import Image

    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(count):
        frame, mask = _endoscopy_frame(np.random.default_rng([seed, index]), size)
        name = f"phantom_{index:03d}.jpg"
        Image.fromarray(frame).save(folder / "images" / name, quality=95)
        Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(folder / "masks" / name, quality=85)


def _endoscopy_frame(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Paint one frame.

    Returns:
        RGB frame `(H, W, 3)` and mask `(H, W)` with values 0 and 255, both uint8; W is larger than H.
    """
    middle = sum(size) // 2
    height, width = int(rng.integers(size[0], middle)), int(rng.integers(middle, size[1] + 1))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    y *= height / width  # one unit is half the width on both axes

    texture = sum(
        weight * smooth_noise(rng, (height, width), (knots, knots))
        for weight, knots in ((0.08, 5), (0.04, 14), (0.025, 45))
    )
    phase = rng.uniform(0, 2 * np.pi)
    lumen_x, lumen_y = rng.uniform(-0.8, 0.8), rng.uniform(-0.5, 0.5)
    to_lumen = np.hypot(x - lumen_x, y - lumen_y)
    folds = np.sin(9 * (to_lumen + 0.08 * smooth_noise(rng, (height, width), (6, 6))) + phase)
    vessels = np.exp(-((smooth_noise(rng, (height, width), (12, 12)) / 0.06) ** 2))
    brightness = 0.72 + texture + 0.10 * folds - 0.45 * np.exp(-((to_lumen / 0.22) ** 2)) - 0.06 * vessels

    # Polyp: distance 1 on a lobed ellipse, a dome inside, a thin shadow outside.
    radius = rng.uniform(0.16, 0.34)
    center_x, center_y = rng.uniform(-0.45, 0.45), rng.uniform(-0.28, 0.28)
    angle = np.arctan2(y - center_y, x - center_x)
    outline = 1 + sum(
        rng.uniform(0, 0.24 / lobes) * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi)) for lobes in (2, 3, 4, 5)
    )
    distance = np.hypot(x - center_x, (y - center_y) * rng.uniform(1.0, 1.35)) / (radius * outline)
    inside = distance < 1
    dome = np.sqrt(np.clip(1 - distance**2, 0, 1))
    light = rng.uniform(0, 2 * np.pi)
    slope = ((x - center_x) * np.cos(light) + (y - center_y) * np.sin(light)) / radius
    bump = 0.70 + 0.12 * dome - 0.14 * slope + 0.7 * texture
    shadow = 0.22 * np.exp(-(((distance - 1.06) / 0.09) ** 2))
    soft = blur(inside.astype(float), 1.2)
    brightness = brightness * (1 - soft) + bump * soft - shadow * (1 - soft)

    mucosa = np.array([0.98, 0.58, 0.47]) + rng.uniform(-0.05, 0.05, 3)
    polyp = mucosa * (1 + np.array([0.0, -0.10, -0.06]) * rng.choice([-0.6, 1.0]))
    color = mucosa + soft[..., None] * (polyp - mucosa)
    color = color - 0.05 * vessels[..., None] * np.array([0, 1, 1])
    redness = 0.05 * smooth_noise(rng, (height, width), (4, 4))[..., None]  # patches of inflamed mucosa
    frame = brightness[..., None] * (color - redness * np.array([0, 1, 1]))

    glare = np.zeros((height, width))
    for _ in range(rng.integers(6, 16)):
        row, column = rng.integers(4, height - 4), rng.integers(4, width - 4)
        glare[row : row + rng.integers(1, 4), column : column + rng.integers(1, 6)] = 1
    frame = np.maximum(frame, 1.6 * blur(glare, 1.0)[..., None])
    frame *= 1 - 0.35 * np.clip(x**2 + y**2, 0, 1)[..., None]
    frame[np.abs(x) + np.abs(y) > 0.62 + height / width] = 0.02  # the octagon of the video processor
    frame += 0.015 * rng.standard_normal(frame.shape)
    return (np.clip(frame, 0, 1) * 255).astype(np.uint8), (inside * 255).astype(np.uint8)
