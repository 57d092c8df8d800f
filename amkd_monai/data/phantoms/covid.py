"""CT-like slices through the lungs with patches of ground glass and consolidation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amkd_monai.data.phantoms.tools import blur, smooth_noise, writer


@writer("covid")
def write_covid(folder: Path, count: int = 40, size: tuple[int, int] = (140, 220), seed: int = 0) -> None:
    """Write slices as `COVID/images/<N>.jpg` and `COVID/masks/<N>.png`.

    Vessels, the heart, and gravity's haze at the back are as bright as the infection. A tenth of the slices has none.

    Args:
        folder: an empty folder.
        count: number of slices.
        size: smallest and largest side in pixels; no slice is square.
        seed: seed of all draws.
    """
    from PIL import Image

    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(count):
        grey, mask = ct_slice(np.random.default_rng([seed, index]), size, infected=index % 10 != 9)
        Image.fromarray(grey).save(folder / "images" / f"{index}.jpg", quality=95)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{index}.png")


@writer("covid_volumes")
def write_covid_volumes(
    folder: Path, cases: int = 8, shape: tuple[int, int, int] = (88, 72, 14), seed: int = 0
) -> None:
    """Write volumes in Hounsfield units as `COVID-volumes/{COVID-19-CT-Seg_20cases,Infection_Mask}/case_<N>.nii.gz`.

    Args:
        folder: an empty folder.
        cases: number of volumes.
        shape: voxels from right to left, from front to back, from below to above; the voxels have 4 x 4 x 8 mm.
        seed: seed of all draws.
    """
    import nibabel

    affine = np.diag([-4.0, -4.0, 8.0, 1.0])  # array axes run to the left, to the back, upwards
    images, masks = folder / "COVID-19-CT-Seg_20cases", folder / "Infection_Mask"
    images.mkdir()
    masks.mkdir()
    for case in range(cases):
        volume, mask = ct_volume(np.random.default_rng([seed, case]), shape)
        for array, place in ((volume, images), (mask, masks)):
            nibabel.Nifti1Image(array, affine).to_filename(place / f"case_{case + 1:03d}.nii.gz")


def ct_volume(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw a chest with infected patches that run through several slices.

    Returns:
        Volume (X, Y, Z) int16 in HU and mask (X, Y, Z) uint8.
    """
    axes = [np.linspace(-1, 1, length) for length in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    noise = smooth_noise(rng, shape, (7, 7, 5))
    body = np.hypot(x / 0.95, y / 0.9) < 1
    hu = np.where(body, 40.0, -1000.0)
    hu[np.hypot(x / 0.11, (y - 0.62) / 0.13) < 1] = 350  # the spine
    narrow = 1 - 0.35 * np.abs(z)  # lungs narrow towards both ends
    sides = [np.hypot((x - side * 0.42) / (0.33 * narrow), y / (0.6 * narrow)) + 0.03 * noise < 1 for side in (-1, 1)]
    lungs = (sides[0] | sides[1]) & ~(np.hypot((x - 0.1) / 0.26, (y + 0.18) / 0.34) < 1)
    vessels = np.exp(-((smooth_noise(rng, shape, (16, 14, 5)) / 0.08) ** 2))
    hu = np.where(lungs, -840 + 110 * np.clip(y, 0, 1) + 450 * vessels * (noise > 0.3), hu)
    mask = np.zeros(shape, bool)
    places = np.argwhere(lungs)
    for _ in range(rng.integers(2, 5)):
        center = places[rng.integers(len(places))]
        offset = [
            (axis - axes[i][center[i]]) / radius
            for i, (axis, radius) in enumerate(zip((x, y, z), (0.24, 0.24, 0.4), strict=True))
        ]
        patch = (np.linalg.norm(offset, axis=0) + 0.2 * noise < 1) & lungs
        hu = np.where(patch, np.maximum(hu, rng.uniform(-620, -250)), hu)
        mask |= patch
    hu = blur(hu, 0.6) + 25 * rng.standard_normal(shape)
    return hu.astype(np.int16), mask.astype(np.uint8)


def ct_slice(rng: np.random.Generator, size: tuple[int, int], infected: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Paint one slice in a lung window.

    Args:
        rng: source of all draws.
        size: smallest and largest side in pixels.
        infected: whether there is an infection.

    Returns:
        Grey image (H, W) uint8 and boolean mask (H, W); W is larger than H.
    """
    middle = sum(size) // 2
    height, width = int(rng.integers(size[0], middle)), int(rng.integers(middle, size[1] + 1))
    shape = (height, width)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    wobble = 0.03 * smooth_noise(rng, shape, (6, 6))

    body = np.hypot(x / 0.95, y / 0.90) + wobble < 1
    grey = np.where(body, 0.72, 0.02)
    bone = np.abs(np.hypot(x / 0.86, y / 0.80) - 1) < 0.025
    grey[bone & (np.sin(14 * np.arctan2(y, x) + rng.uniform(0, 6)) > 0.2)] = 1.0
    grey[np.hypot(x / 0.11, (y - 0.62) / 0.13) < 1] = 0.95  # the spine

    lungs = np.zeros(shape, bool)
    for side in (-1, 1):
        center, radii = (
            (side * rng.uniform(0.40, 0.44), rng.uniform(-0.08, 0.05)),
            rng.uniform((0.29, 0.5), (0.36, 0.62)),
        )
        lungs |= np.hypot((x - center[0]) / radii[0], (y - center[1]) / radii[1]) + wobble < 1
    heart = np.hypot((x - rng.uniform(-0.12, 0.15)) / 0.26, (y + 0.18) / 0.34) < 1
    lungs &= ~heart
    haze = 0.10 * np.clip(y, 0, 1)
    vessels = np.exp(-((smooth_noise(rng, shape, (16, 20)) / 0.07) ** 2)) * (smooth_noise(rng, shape, (8, 8)) > 0.3)
    lung = 0.14 + haze + 0.03 * smooth_noise(rng, shape, (20, 24)) + 0.42 * blur(vessels, 0.7)
    grey = np.where(lungs, lung, grey)

    mask = np.zeros(shape, bool)
    rows, columns = lungs.nonzero()
    for _ in range(rng.integers(1, 5) if infected else 0):
        pick = rng.integers(len(rows))
        center_y, center_x = y[rows[pick], 0], x[0, columns[pick]]
        radius = rng.uniform(0.14, 0.32)
        distance = np.hypot(x - center_x, y - center_y) / radius + 0.25 * smooth_noise(rng, shape, (9, 9))
        patch = (distance < 1) & lungs
        soft = blur(patch.astype(float), 1.0)
        texture = rng.uniform(0.34, 0.62) + 0.05 * smooth_noise(rng, shape, (30, 30))
        grey = np.where(lungs, np.maximum(grey, grey * (1 - soft) + texture * soft), grey)
        mask |= patch
    grey = blur(grey, 0.6) + 0.025 * rng.standard_normal(shape)
    return (np.clip(grey, 0, 1) * 255).astype(np.uint8), mask
