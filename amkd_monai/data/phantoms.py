"""Generated data in the official layouts: a demonstration that runs everywhere, never a result.

`write_kvasir_seg` paints colonoscopy-like frames, `write_msd_heart` heart-MRI-like volumes. In both the
target has neighbours of its own brightness, so a threshold does not find it. All draws come from one seed.
A data set appears under its final name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from amkd_monai.data.phantoms_aptos2019 import paint_aptos2019
from amkd_monai.data.phantoms_isic2017 import paint_isic2017
from amkd_monai.tasks import get_task

PHANTOM_MARKER = "PHANTOM.txt"
HEART_SPACING_MM = (2.5, 2.5, 1.37)
HEART_HALF_EXTENT_MM = (24.0, 119.0, 68.0)


def is_phantom(folder: Path) -> bool:
    """Whether a data set folder was written by this module."""
    return (Path(folder) / PHANTOM_MARKER).is_file()


def write_phantom(task_name: str, root: Path) -> Path:
    """Write the phantoms of a task into `root` unless they are there; return the data set folder.

    Args:
        task_name: a key of `amkd_monai.tasks.TASKS`.
        root: folder in which the folder of the data set (its official name) is made.

    Raises:
        ValueError: no such task.
        FileExistsError: the folder is there and does not hold phantoms.
    """
    folder = Path(root) / get_task(task_name).folder
    return folder if is_phantom(folder) else _WRITERS[task_name](Path(root))


def write_kvasir_seg(root: Path, count: int = 40, size: tuple[int, int] = (150, 230), seed: int = 0) -> Path:
    """Write polyp frames as `Kvasir-SEG/{images,masks}/<id>.jpg`.

    Frames show mottled mucosa with folds, vessels and highlights in a vignette with black corners; the polyp
    is a shaded bump of nearly the same colour. Masks are RGB JPEGs and ring at their edges, as the real ones.

    Args:
        root: folder in which `Kvasir-SEG` is made.
        count: number of frames.
        size: smallest and largest side in pixels; no frame is square.
        seed: seed of all draws.

    Returns:
        The folder `root/Kvasir-SEG`.

    Raises:
        FileExistsError: the folder is there and does not hold phantoms.
    """
    from PIL import Image

    target = Path(root) / get_task("kvasir_seg").folder
    with _published(target) as folder:
        for name in ("images", "masks"):
            (folder / name).mkdir()
        for index in range(count):
            frame, mask = _endoscopy_frame(np.random.default_rng([seed, index]), size)
            name = f"phantom_{index:03d}.jpg"
            Image.fromarray(frame).save(folder / "images" / name, quality=95)
            Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(folder / "masks" / name, quality=85)
    return target


def write_msd_heart(root: Path, cases: int = 8, shape: tuple[int, int, int] = (20, 96, 100), seed: int = 0) -> Path:
    """Write heart volumes as `Task02_Heart/{dataset.json,imagesTr,labelsTr,imagesTs}`.

    Volumes are int16 with a spacing of 2.5 x 2.5 x 1.37 mm and axis codes RAS. The left atrium is a lobed blob
    with vein stubs near the centre, between a ventricle, an atrium and an aorta of about its brightness.

    Args:
        root: folder in which `Task02_Heart` is made.
        cases: number of labelled volumes; two more without labels go to `imagesTs`.
        shape: voxels along the three array axes; the last one varies by up to 8 between cases.
        seed: seed of all draws.

    Returns:
        The folder `root/Task02_Heart`.

    Raises:
        FileExistsError: the folder is there and does not hold phantoms.
    """
    import nibabel

    affine = np.diag([*HEART_SPACING_MM, 1.0])
    names = [f"la_{index + 1:03d}.nii.gz" for index in range(cases + 2)]
    target = Path(root) / get_task("msd_heart").folder
    with _published(target) as folder:
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
    return target


def write_painted(task_name: str, paint: Callable[[Path], None], root: Path) -> Path:
    """Write the phantoms of a task by a function that fills an empty folder; return the data set folder.

    Raises:
        FileExistsError: the folder is there and does not hold phantoms.
    """
    target = Path(root) / get_task(task_name).folder
    with _published(target) as folder:
        paint(folder)
    return target


_WRITERS: dict[str, Callable[[Path], Path]] = {
    "kvasir_seg": write_kvasir_seg,
    "msd_heart": write_msd_heart,
    "aptos2019": partial(write_painted, "aptos2019", paint_aptos2019),
    "isic2017": partial(write_painted, "isic2017", paint_isic2017),
    "isic2017_lesion": partial(write_painted, "isic2017_lesion", paint_isic2017),
}


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """Build a folder beside `target` and rename it in one step, so that a killed run leaves no half of it."""
    if target.exists():
        raise FileExistsError(f"{target} exists already: phantoms are not written over it, remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder = scratch / target.name  # a child, as mkdtemp itself is closed to other users
        folder.mkdir()
        yield folder
        (folder / PHANTOM_MARKER).write_text("Generated by amkd_monai.data.phantoms, no patient data.\n")
        try:
            folder.replace(target)
        except OSError:
            if not is_phantom(target):  # otherwise another process has just written the same data
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], knots: Sequence[int]) -> np.ndarray:
    """Noise of `shape` with mean 0 and deviation 1 that varies over about one knot distance per axis."""
    noise = rng.standard_normal(knots)
    for axis, (length, count) in enumerate(zip(shape, knots, strict=True)):
        distance = np.linspace(0, count - 1, length)[:, None] - np.arange(count)[None, :]
        weights = np.exp(-(distance**2))
        weights /= weights.sum(axis=1, keepdims=True)
        noise = np.moveaxis(np.tensordot(weights, noise, axes=(1, axis)), 0, axis)
    return (noise - noise.mean()) / noise.std()


def _blur(array: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur along every axis, `sigma` in samples."""
    for axis, length in enumerate(array.shape):
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        weights = np.exp(-0.5 * (distance / sigma) ** 2)
        weights /= weights.sum(axis=1, keepdims=True)
        array = np.moveaxis(np.tensordot(weights, array, axes=(1, axis)), 0, axis)
    return array


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
        weight * _smooth_noise(rng, (height, width), (knots, knots))
        for weight, knots in ((0.08, 5), (0.04, 14), (0.025, 45))
    )
    phase = rng.uniform(0, 2 * np.pi)
    lumen_x, lumen_y = rng.uniform(-0.8, 0.8), rng.uniform(-0.5, 0.5)
    to_lumen = np.hypot(x - lumen_x, y - lumen_y)
    folds = np.sin(9 * (to_lumen + 0.08 * _smooth_noise(rng, (height, width), (6, 6))) + phase)
    vessels = np.exp(-((_smooth_noise(rng, (height, width), (12, 12)) / 0.06) ** 2))
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
    soft = _blur(inside.astype(float), 1.2)
    brightness = brightness * (1 - soft) + bump * soft - shadow * (1 - soft)

    mucosa = np.array([0.98, 0.58, 0.47]) + rng.uniform(-0.05, 0.05, 3)
    polyp = mucosa * (1 + np.array([0.0, -0.10, -0.06]) * rng.choice([-0.6, 1.0]))
    color = mucosa + soft[..., None] * (polyp - mucosa)
    color = color - 0.05 * vessels[..., None] * np.array([0, 1, 1])
    redness = 0.05 * _smooth_noise(rng, (height, width), (4, 4))[..., None]  # patches of inflamed mucosa
    frame = brightness[..., None] * (color - redness * np.array([0, 1, 1]))

    glare = np.zeros((height, width))
    for _ in range(rng.integers(6, 16)):
        row, column = rng.integers(4, height - 4), rng.integers(4, width - 4)
        glare[row : row + rng.integers(1, 4), column : column + rng.integers(1, 6)] = 1
    frame = np.maximum(frame, 1.6 * _blur(glare, 1.0)[..., None])
    frame *= 1 - 0.35 * np.clip(x**2 + y**2, 0, 1)[..., None]
    frame[np.abs(x) + np.abs(y) > 0.62 + height / width] = 0.02  # the octagon of the video processor
    frame += 0.015 * rng.standard_normal(frame.shape)
    return (np.clip(frame, 0, 1) * 255).astype(np.uint8), (inside * 255).astype(np.uint8)


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
        return distance + roughness * _smooth_noise(rng, shape, (4, 12, 12)) < 1

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
    signal = body * (330 + 50 * _smooth_noise(rng, shape, (5, 20, 20)))
    for organ in neighbours:
        signal[organ & body] = rng.uniform(820, 1020)
    signal[atrium] = rng.uniform(850, 1000)
    signal = _blur(signal, 0.8) * np.exp(0.18 * _smooth_noise(rng, shape, (2, 3, 3)))  # bias field
    real, imaginary = rng.normal(0, 45, (2, *shape))  # Rician noise, as in magnitude images
    return np.hypot(signal + real, imaginary).astype(np.int16), atrium.astype(np.uint8)
