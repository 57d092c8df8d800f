"""Heart-MRI-like volumes with a left atrium between organs of its own brightness."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from amkd_monai.data.phantoms.tools import blur, smooth_noise, writer

HEART_SPACING_MM = (2.5, 2.5, 1.37)
HEART_HALF_EXTENT_MM = (24.0, 119.0, 68.0)


@writer("msd_heart")
def write_msd_heart(folder: Path, cases: int = 8, shape: tuple[int, int, int] = (20, 96, 100), seed: int = 0) -> None:
    """Write heart volumes as `Task02_Heart/{dataset.json,imagesTr,labelsTr,imagesTs}`.

    Volumes are int16 with a spacing of 2.5 x 2.5 x 1.37 mm and axis codes RAS. The left atrium is a lobed blob
    with vein stubs near the centre, between a ventricle, an atrium and an aorta of about its brightness.

    Args:
        folder: an empty folder.
        cases: number of labelled volumes; two more without labels go to `imagesTs`.
        shape: voxels along the three array axes; the last one varies by up to 8 between cases.
        seed: seed of all draws.
    """
    import nibabel

    affine = np.diag([*HEART_SPACING_MM, 1.0])
    names = [f"la_{index + 1:03d}.nii.gz" for index in range(cases + 2)]
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir()
    for index, name in enumerate(names):
        volume, label = _heart_volume(np.random.default_rng([seed, index]), shape)
        images = "imagesTr" if index < cases else "imagesTs"
        nibabel.Nifti1Image(volume, affine).to_filename(folder / images / name)
        if index < cases:
            nibabel.Nifti1Image(label, affine).to_filename(folder / "labelsTr" / name)
    content = {
        "name": "LeftAtrium",
        "description": "Left atrium segmentation: generated phantoms, no patient data",
        "tensorImageSize": "3D",
        "reference": "amkd_monai.data.phantoms",
        "licence": "CC0",
        "relase": "1.0 04/05/2018",  # misspelt in the official file too
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left atrium"},
        "numTraining": cases,
        "numTest": 2,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names[:cases]],
        "test": [f"./imagesTs/{name}" for name in names[cases:]],
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _heart_volume(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one case; organs keep their places relative to the borders, whatever the shape.

    Returns:
        Volume (int16, arbitrary MR units) and label (uint8, 1 is left atrium), both of `shape` up to the
        variation of the last axis.
    """
    shape = (shape[0], shape[1], shape[2] + int(rng.integers(-8, 9)))
    axes = [np.linspace(-half, half, n) for half, n in zip(HEART_HALF_EXTENT_MM, shape, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)  # (X, Y, Z, 3) in mm from the centre

    def ellipsoid(center: np.ndarray, radii: np.ndarray, roughness: float = 0.0) -> np.ndarray:
        distance = np.linalg.norm((points - center) / radii, axis=-1)
        return distance + roughness * smooth_noise(rng, shape, (4, 12, 12)) < 1

    def tube(start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
        along = np.clip((points - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
        return np.linalg.norm(points - start - along[..., None] * (end - start), axis=-1) < radius

    center = rng.normal(0, (2, 5, 4))
    radii = rng.uniform((13, 16, 17), (17, 22, 22))
    atrium = ellipsoid(center, radii, roughness=0.10)
    for side_x, side_z in ((-1, -1), (-1, 1), (1, -1), (1, 1)):  # four pulmonary veins, pointing backwards
        direction = np.array([0.5 * side_x, -0.8, 0.6 * side_z]) + rng.normal(0, 0.12, 3)
        direction /= np.linalg.norm(direction)
        reach = 1 / np.linalg.norm(direction / radii) + rng.uniform(6, 12)
        atrium |= tube(center, center + reach * direction, rng.uniform(3.5, 5.0))

    neighbours = (
        ellipsoid(center + rng.normal((0, 46, -8), 2), rng.uniform((17, 21, 20), (21, 25, 25)), 0.06),  # ventricle
        ellipsoid(center + rng.normal((0, 4, 45), 2), rng.uniform((14, 18, 15), (19, 24, 18)), 0.06),  # right atrium
        tube(center + np.array([4, -110, -38]), center + np.array([2, 12, -36]), rng.uniform(9, 11)),  # aorta
    )
    body = ellipsoid(np.zeros(3), np.array([95, 108, 64]))
    signal = body * (330 + 50 * smooth_noise(rng, shape, (5, 20, 20)))
    for organ in neighbours:
        signal[organ & body] = rng.uniform(820, 1020)
    signal[atrium] = rng.uniform(850, 1000)
    signal = blur(signal, 0.8) * np.exp(0.18 * smooth_noise(rng, shape, (2, 3, 3)))  # bias field
    real, imaginary = rng.normal(0, 45, (2, *shape))  # Rician noise, as in magnitude images
    return np.hypot(signal + real, imaginary).astype(np.int16), atrium.astype(np.uint8)
