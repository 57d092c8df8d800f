"""Generated data in the official layouts: a demonstration that runs everywhere, never a result.

Each function fills an empty folder; all draws come from ``seed``. In every data set the target has neighbours of its
own brightness, so that no threshold finds it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

GRADE_SHARES = (0.34, 0.16, 0.24, 0.12, 0.14)
"""Shares of the APTOS grades: rarer where the disease is severe, but enough of each for a short run."""
FUNDUS_LESIONS = {
    "microaneurysms": ((0, 0), (2, 5), (8, 16), (18, 30), (14, 30)),
    "haemorrhages": ((0, 0), (0, 0), (2, 5), (8, 14), (7, 14)),
    "exudates": ((0, 0), (0, 0), (2, 8), (6, 16), (6, 18)),
    "new_vessels": ((0, 0), (0, 0), (0, 0), (0, 0), (3, 5)),
}
"""Fewest and most lesions of a kind by grade."""


def aptos2019(folder: Path, count: int = 75, unlabelled: int = 6, height: int = 180, seed: int = 0) -> None:
    """Write fundus photographs as `train.csv`, `train_images/`, `test.csv` (no grades) and `test_images/`."""
    shares = np.round(np.cumsum(GRADE_SHARES) * count).astype(int)
    grades = np.repeat(np.arange(5), np.diff([0, *shares[:-1], count]))
    rows: dict[str, list[list[object]]] = {"train": [], "test": []}
    for index in range(count + unlabelled):
        rng = np.random.default_rng([seed, index])
        section = "train" if index < count else "test"
        grade = int(grades[index]) if index < count else int(rng.integers(5))
        name = "".join(rng.choice(list("0123456789abcdef"), 12))
        _save(_photograph(rng, grade, height), folder / f"{section}_images" / f"{name}.png")
        rows[section].append([name, grade] if section == "train" else [name])
    for section, header in (("train", ["id_code", "diagnosis"]), ("test", ["id_code"])):
        _write_table(folder / f"{section}.csv", header, sorted(rows[section], key=str))


def _photograph(rng: np.random.Generator, grade: int, height: int) -> np.ndarray:
    """Paint a retina (H, W, 3) with black borders and the lesions of a grade."""
    h = int(height * rng.uniform(0.9, 1.1))
    w = int(h * rng.uniform(1.25, 1.5))
    radius = h * rng.uniform(0.47, 0.54)
    y, x = np.mgrid[:h, :w].astype(float)
    y, x = (y - h / 2) / radius, (x - w / 2 - rng.uniform(-0.05, 0.05) * w) / radius  # the disc has radius 1
    base = np.array([0.78, 0.40, 0.20]) * rng.uniform(0.8, 1.15) + rng.normal(0, 0.02, 3)
    shade = 1 - 0.35 * (x**2 + y**2) + 0.10 * _grain(rng, (h, w), h / 8) + 0.03 * _grain(rng, (h, w), 2.0)
    image = base * shade[..., None]

    def spot(centre: tuple[float, float], radius: float, x: np.ndarray = x, y: np.ndarray = y) -> np.ndarray:
        return np.exp(-((((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius**2) ** 2))

    def window(points: np.ndarray, reach: float) -> tuple[slice, slice]:
        """Rows and columns within `reach` of points (n, 2) as (x, y): what is painted there is invisible beyond."""
        (left, top), (right, bottom) = points.min(0) - reach, points.max(0) + reach
        rows, columns = np.searchsorted(y[:, 0], (top, bottom)), np.searchsorted(x[0], (left, right))
        return slice(*rows), slice(*columns)

    def stain(cover: np.ndarray, colour: tuple[float, float, float], strength: float, part: Any = ...) -> None:
        image[part] += strength * cover[..., None] * (np.array(colour) - image[part])

    def stain_spot(
        centre: tuple[float, float], radius: float, colour: tuple[float, float, float], strength: float
    ) -> None:
        part = window(np.array([centre]), 3 * radius)
        stain(spot(centre, radius, x[part], y[part]), colour, strength, part)

    def vessel(start: tuple[float, float], end: np.ndarray | tuple[float, float], width: float) -> None:
        """Darken the image along a bent line that gets thinner."""
        begin, finish = np.array(start), np.array(end)
        bend = (begin + finish) / 2 + rng.normal(0, 0.12, 2)
        t = np.linspace(0, 1, 28)[:, None]
        points, widths = (1 - t) ** 2 * begin + 2 * t * (1 - t) * bend + t**2 * finish, width * (1.3 - t[:, 0])
        part = window(points, 9 * widths[0])
        nearest = np.full(x[part].shape, np.inf)
        for (px, py), reach in zip(points, widths, strict=True):
            nearest = np.minimum(nearest, ((x[part] - px) ** 2 + (y[part] - py) ** 2) / (2 * reach**2))
        image[part] *= 1 - 0.45 * np.exp(-nearest)[..., None]

    def places(kind: str) -> list[tuple[float, float]]:
        low, high = FUNDUS_LESIONS[kind][grade]
        angle = rng.uniform(0, 2 * np.pi, rng.integers(low, high + 1))
        distance = 0.85 * np.sqrt(rng.uniform(0.02, 1, len(angle)))
        return list(zip(distance * np.cos(angle), distance * np.sin(angle), strict=True))

    side = rng.choice([-1, 1])  # right or left eye
    nerve, macula = (side * 0.55, rng.normal(0, 0.04)), (-side * 0.1, rng.normal(0, 0.04))
    image += 0.4 * spot(nerve, 0.13)[..., None] * np.array([1, 0.9, 0.6])
    image *= 1 - 0.35 * spot(macula, 0.16)[..., None]
    for sign in (-1, 1):
        for reach in rng.uniform(0.25, 0.95, 4):
            vessel(nerve, (-side * reach, sign * rng.uniform(0.3, 0.9)), 0.018)
    for place in places("microaneurysms"):
        stain_spot(place, rng.uniform(0.018, 0.026), (0.30, 0.03, 0.03), 0.9)
    for place in places("haemorrhages"):
        blot = spot(x=x * rng.uniform(0.7, 1.3), centre=place, radius=rng.uniform(0.045, 0.09))
        stain(np.clip(blot * (1 + 0.4 * _grain(rng, (h, w), 2.0)), 0, 1), (0.22, 0.02, 0.03), 0.95)
    for place in places("exudates"):
        stain_spot(place, rng.uniform(0.025, 0.05), (0.98, 0.90, 0.50), 0.95)
    for place in places("new_vessels"):
        for _ in range(6):  # a tuft
            vessel(place, np.array(place) + rng.normal(0, 0.12, 2), 0.012)
    image += rng.normal(0, 0.012, image.shape)
    return _levels(image * (x**2 + y**2 < 1)[..., None])


def busi(folder: Path, count: int = 18, size: tuple[int, int] = (130, 210), seed: int = 0) -> None:
    """Write ultrasound images as `<class>/<class> (N).png` and masks; `count` benign, as many malignant, few normal.

    As in the real data, masks of benign and malignant images are 1-bit, of normal ones RGB and empty; an image with two
    lesions has two mask files; one image comes twice, with calipers burnt in.
    """
    for kind, name in enumerate(("benign", "malignant", "normal")):
        for index in range(count if name != "normal" else max(1, count // 3)):
            rng = np.random.default_rng([seed, kind, index])
            lesions = 2 if (name, index) == ("benign", 0) else int(name != "normal")
            grey, masks = ultrasound_image(rng, size, lesions, malignant=name == "malignant")
            copies = [(index + 1, grey)]
            if (name, index) == ("malignant", 0):
                copies.append((count + 1, _with_calipers(grey, masks[0])))
            for number, image in copies:
                _save(np.repeat(image[..., None], 3, axis=2), folder / name / f"{name} ({number}).png")
                for i, mask in enumerate(masks if name != "normal" else [np.zeros((*grey.shape, 3), np.uint8)]):
                    _save(mask, folder / name / f"{name} ({number})_mask{f'_{i}' if i else ''}.png")


def _with_calipers(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Burn two crosses into a copy, at the ends of the lesion's width."""
    grey = grey.copy()
    rows, columns = mask.nonzero()
    for column in (columns.min(), columns.max()):
        row = int(rows[columns == column].mean())
        grey[row, max(0, column - 3) : column + 4] = 255
        grey[max(0, row - 3) : row + 4, column] = 255
    return grey


def ultrasound_image(
    rng: np.random.Generator, size: tuple[int, int], lesions: int, malignant: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Paint speckle, layers of tissue and lesions: grey image (H, W) and one boolean mask (H, W) per lesion.

    Malignant lesions have ragged outlines and a shadow below, others a capsule and brighter tissue below.
    """
    shape = height, width = _sides(rng, size)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : width / height : width * 1j]  # one unit is the height
    depth = y + 0.03 * _smooth_noise(rng, shape, (3, 6))
    skin, fat, muscle = rng.uniform(0.05, 0.09), rng.uniform(0.22, 0.32), rng.uniform(0.74, 0.86)
    level = np.select([depth < skin, depth < fat, depth < muscle], [0.85, 0.36, 0.55], 0.44)
    level = _blur(level, 1.5) + 0.05 * _smooth_noise(rng, shape, (12, 8))
    for _ in range(rng.integers(2, 5)):  # lobules of fat: as dark as a lesion, but flat and without an edge
        center = rng.uniform(0.1, 0.9) * width / height, rng.uniform(0.12, 0.3)
        lobule = np.hypot((x - center[0]) / rng.uniform(0.12, 0.25), (y - center[1]) / rng.uniform(0.03, 0.05))
        level -= 0.22 * np.exp(-(lobule**4))
    for _ in range(rng.integers(1, 3)):  # shadows of ribs and gas, from the depth of the muscle down
        column = rng.uniform(0, width / height)
        level -= 0.25 * np.exp(-(((x - column) / 0.05) ** 2)) * (depth > muscle)

    masks = []
    for number in range(lesions):
        share = width / height / lesions
        center_x, center_y = share * (number + rng.uniform(0.38, 0.62)), rng.uniform(0.42, 0.60)
        radius = rng.uniform(0.10, 0.19) / (1.25 if lesions > 1 else 1)
        outline = _outline(rng, np.arctan2(y - center_y, x - center_x), 0.5 if malignant else 0.12, (2, 3, 5, 7))
        flat = rng.uniform(0.9, 1.15) if malignant else rng.uniform(1.2, 1.7)
        distance = np.hypot(x - center_x, (y - center_y) * flat) / (radius * outline)
        inside = distance < 1
        below = np.clip((y - center_y) / 0.25, 0, 1) * np.exp(-(((x - center_x) / radius) ** 4)) * ~inside
        soft = _blur(inside.astype(float), 1.5 if malignant else 0.9)
        level = level * (1 - soft) + (0.20 + 0.03 * _smooth_noise(rng, shape, (9, 9))) * soft
        level += (-0.20 if malignant else 0.15) * below
        if not malignant:
            level += 0.12 * np.exp(-(((distance - 1.05) / 0.05) ** 2))  # the capsule
        masks.append(inside)

    fine = (height // 2, width // 3)
    echo = np.abs(_smooth_noise(rng, shape, fine) + 1j * _smooth_noise(rng, shape, fine))
    grey = np.clip(level, 0.03, 1) * (0.35 + 0.55 * echo)
    grey = np.log1p(9 * np.clip(grey, 0, 2)) / np.log(19)  # what a scanner shows is compressed
    return _levels(grey * (1 - 0.25 * (y - rng.uniform(0.3, 0.7)) ** 2)), masks


def covid(folder: Path, count: int = 40, size: tuple[int, int] = (140, 220), seed: int = 0) -> None:
    """Write CT slices in a lung window as `images/<N>.jpg` and `masks/<N>.png`; a tenth of them without infection."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        height, width = _sides(rng, size)
        hu, mask = _chest(rng, (width, height, 1), infected=index % 10 != 9)
        _save(_levels((hu[..., 0].T + 1250) / 1500), folder / "images" / f"{index}.jpg", quality=95)
        _save(mask[..., 0].T * 255, folder / "masks" / f"{index}.png")


def covid_volumes(folder: Path, cases: int = 8, shape: tuple[int, int, int] = (88, 72, 14), seed: int = 0) -> None:
    """Write CT volumes in HU as `COVID-19-CT-Seg_20cases/case_<N>.nii.gz` with masks in `Infection_Mask/`."""
    affine = np.diag([-4.0, -4.0, 8.0, 1.0])  # array axes run to the left, to the back, upwards; 4 x 4 x 8 mm
    for case in range(cases):
        volume, mask = _chest(np.random.default_rng([seed, case]), shape)
        _save_volume(volume, affine, folder / "COVID-19-CT-Seg_20cases" / f"case_{case + 1:03d}.nii.gz")
        _save_volume(mask, affine, folder / "Infection_Mask" / f"case_{case + 1:03d}.nii.gz")


def _chest(
    rng: np.random.Generator, shape: tuple[int, int, int], infected: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a chest with infected patches that run through several slices: HU int16 and mask, both (X, Y, Z).

    Vessels, the heart and gravity's haze at the back are as bright as the infection.
    """
    axes = [np.linspace(-1, 1, length) if length > 1 else np.zeros(1) for length in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    noise = _smooth_noise(rng, shape, (7, 7, 5))
    hu = np.where(np.hypot(x / rng.uniform(0.8, 0.97), y / rng.uniform(0.8, 0.97)) + 0.03 * noise < 1, 40.0, -1000.0)
    hu[np.hypot(x / 0.11, (y - 0.62) / 0.13) < 1] = 350  # the spine
    lungs = np.zeros(shape, bool)
    for side in (-1, 1):
        middle, size = (side * rng.uniform(0.36, 0.44), rng.uniform(-0.1, 0.1)), rng.uniform((0.25, 0.45), (0.33, 0.62))
        distance = np.hypot((x - middle[0]) / size[0], (y - middle[1]) / size[1]) / (1 - 0.35 * np.abs(z))
        lungs |= distance + 0.06 * noise < 1
    lungs &= np.hypot((x - rng.uniform(-0.15, 0.2)) / 0.26, (y + 0.18) / rng.uniform(0.28, 0.4)) > 1  # the heart
    vessels = np.exp(-((_smooth_noise(rng, shape, (16, 14, 5)) / 0.08) ** 2))
    hu = np.where(lungs, -840 + 110 * np.clip(y, 0, 1) + 450 * vessels * (noise > 0.3), hu)
    mask = np.zeros(shape, bool)
    places = np.argwhere(lungs)
    for _ in range(rng.integers(2, 5) if infected else 0):
        center = tuple(places[rng.integers(len(places))])
        offset = [(axis - axis[center]) / radius for axis, radius in ((x, 0.24), (y, 0.24), (z, 0.4))]
        patch = (np.linalg.norm(offset, axis=0) + 0.2 * noise < 1) & lungs
        hu = np.where(patch, np.maximum(hu, rng.uniform(-620, -250)), hu)
        mask |= patch
    return (_blur(hu, 0.6) + 25 * rng.standard_normal(shape)).astype(np.int16), mask.astype(np.uint8)


def isic2017(folder: Path, counts: Sequence[int] = (54, 15, 24), height: int = 120, seed: int = 0) -> None:
    """Write dermoscopic images of three sections with part 1 masks, part 3 tables and what lies beside them."""
    number = 0
    for section, count in zip(("Training", "Validation", "Test_v2"), counts, strict=True):
        images, masks = folder / f"ISIC-2017_{section}_Data", folder / f"ISIC-2017_{section}_Part1_GroundTruth"
        labels, patients = [], []
        for index in range(count):
            number += 1
            name, kind = f"ISIC_{number:07d}", ("nevus", "melanoma", "keratosis")[index % 3]
            rng = np.random.default_rng([seed, number])
            image, mask = _skin_lesion(rng, kind, height)
            _save(image, images / f"{name}.jpg", quality=92)
            _save(mask, masks / f"{name}_segmentation.png")
            labels.append([name, float(kind == "melanoma"), float(kind == "keratosis")])
            patients.append([name, int(rng.integers(4, 17)) * 5, rng.choice(["male", "female", "unknown"])])
        _save(image // 32 * 32, images / f"{name}_superpixels.png")
        header = ["image_id", "melanoma", "seborrheic_keratosis"]
        _write_table(folder / f"ISIC-2017_{section}_Part3_GroundTruth.csv", header, labels)
        header = ["image_id", "age_approximate", "sex"]
        _write_table(images / f"ISIC-2017_{section}_Data_metadata.csv", header, patients)


def _skin_lesion(rng: np.random.Generator, kind: str, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint a lesion: image (H, W, 3) and mask (H, W); nevi are round, melanomas ragged and lopsided."""
    h = int(height * rng.uniform(0.9, 1.1))
    w = int(h * rng.uniform(1.2, 1.45))
    y, x = np.mgrid[:h, :w].astype(float)
    y, x = (y / h - 0.5 + rng.normal(0, 0.04)), (x - w / 2) / h + rng.normal(0, 0.06)
    skin = np.array([0.86, 0.66, 0.58]) * rng.uniform(0.85, 1.1) + rng.normal(0, 0.02, 3)
    image = skin * (1 + 0.04 * _grain(rng, (h, w), h / 10) + 0.015 * _grain(rng, (h, w), 1.0))[..., None]

    angle = np.arctan2(y, x)
    ragged = {"nevus": 0.05, "melanoma": 0.20, "keratosis": 0.06}[kind]
    outline = 1 + sum(rng.normal(0, ragged / np.sqrt(n)) * np.cos(n * angle + rng.uniform(0, 6.3)) for n in range(2, 8))
    inside = np.hypot(x, y * rng.uniform(0.9, 1.3)) / (rng.uniform(0.2, 0.33) * outline) < 1
    softness = {"nevus": 3.0, "melanoma": 2.0, "keratosis": 0.6}[kind] * h / 120
    cover = gaussian_filter(inside.astype(float), softness)[..., None]

    brown = np.array([0.48, 0.29, 0.20]) * rng.uniform(0.85, 1.2)
    colour = np.broadcast_to(brown, image.shape) * (1 + 0.05 * _grain(rng, (h, w), 2.0))[..., None]
    if kind == "melanoma":  # several colours in patches, dark and blue-grey among them
        for patch in ([0.12, 0.08, 0.08], [0.36, 0.36, 0.46], [0.62, 0.34, 0.28]):
            where = 1 / (1 + np.exp(-6 * (_grain(rng, (h, w), h / 14) - rng.uniform(0.2, 0.7))))[..., None]
            colour = colour * (1 - where) + where * np.array(patch)
    elif kind == "keratosis":  # waxy greyish brown with pale cysts and dark plugs
        colour = np.array([0.55, 0.42, 0.33]) * (1 + 0.14 * _grain(rng, (h, w), 1.6))[..., None]
        for shade, number in ((np.array([0.92, 0.86, 0.74]), 14), (np.array([0.20, 0.14, 0.10]), 12)):
            dots = np.zeros((h, w))
            places = np.argwhere(inside)
            dots[tuple(places[rng.integers(len(places), size=number)].T)] = 1
            dots = np.clip(gaussian_filter(dots, 1.3) * 12, 0, 1)[..., None]
            colour = colour * (1 - dots) + dots * shade
    else:  # an even network
        colour = colour * (1 - 0.12 * np.abs(np.sin(55 * x) * np.sin(55 * y)))[..., None]
    image = image * (1 - cover) + colour * cover
    for _ in range(rng.integers(0, 5)):  # hairs
        slope, place = rng.normal(0, 1), rng.uniform(-0.5, 0.5)
        image[np.abs(y - slope * x - place) < 0.006 * np.hypot(1, slope)] *= 0.35
    return _levels(image + rng.normal(0, 0.012, image.shape)), (inside * 255).astype(np.uint8)


def kvasir_seg(folder: Path, count: int = 40, size: tuple[int, int] = (150, 230), seed: int = 0) -> None:
    """Write colonoscopy frames as `images/<id>.jpg` and `masks/<id>.jpg`: RGB JPEGs that ring at edges, as the real."""
    for index in range(count):
        frame, mask = _endoscopy_frame(np.random.default_rng([seed, index]), size)
        _save(frame, folder / "images" / f"phantom_{index:03d}.jpg", quality=95)
        _save(np.repeat(mask[..., None], 3, axis=2), folder / "masks" / f"phantom_{index:03d}.jpg", quality=85)


def _endoscopy_frame(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Paint mottled mucosa with a polyp of nearly its colour: frame (H, W, 3) and mask (H, W) of 0 and 255."""
    shape = height, width = _sides(rng, size)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    y *= height / width  # one unit is half the width on both axes
    texture = sum(
        weight * _smooth_noise(rng, shape, (knots, knots)) for weight, knots in ((0.08, 5), (0.04, 14), (0.025, 45))
    )
    phase = rng.uniform(0, 2 * np.pi)
    lumen_x, lumen_y = rng.uniform(-0.8, 0.8), rng.uniform(-0.5, 0.5)
    to_lumen = np.hypot(x - lumen_x, y - lumen_y)
    folds = np.sin(9 * (to_lumen + 0.08 * _smooth_noise(rng, shape, (6, 6))) + phase)
    vessels = np.exp(-((_smooth_noise(rng, shape, (12, 12)) / 0.06) ** 2))
    brightness = 0.72 + texture + 0.10 * folds - 0.45 * np.exp(-((to_lumen / 0.22) ** 2)) - 0.06 * vessels

    # polyp: distance 1 on a lobed ellipse, a dome inside, a thin shadow outside
    radius = rng.uniform(0.16, 0.34)
    center_x, center_y = rng.uniform(-0.45, 0.45), rng.uniform(-0.28, 0.28)
    outline = _outline(rng, np.arctan2(y - center_y, x - center_x), 0.24, (2, 3, 4, 5))
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
    redness = 0.05 * _smooth_noise(rng, shape, (4, 4))[..., None]  # patches of inflamed mucosa
    frame = brightness[..., None] * (color - redness * np.array([0, 1, 1]))

    glare = np.zeros(shape)
    for _ in range(rng.integers(6, 16)):
        row, column = rng.integers(4, height - 4), rng.integers(4, width - 4)
        glare[row : row + rng.integers(1, 4), column : column + rng.integers(1, 6)] = 1
    frame = np.maximum(frame, 1.6 * _blur(glare, 1.0)[..., None])
    frame *= 1 - 0.35 * np.clip(x**2 + y**2, 0, 1)[..., None]
    frame[np.abs(x) + np.abs(y) > 0.62 + height / width] = 0.02  # the octagon of the video processor
    return _levels(frame + 0.015 * rng.standard_normal(frame.shape)), (inside * 255).astype(np.uint8)


def msd_heart(folder: Path, cases: int = 8, shape: tuple[int, int, int] = (20, 96, 100), seed: int = 0) -> None:
    """Write heart MRI (int16, RAS) as `dataset.json`, `imagesTr/`, `labelsTr/`, and two volumes in `imagesTs/`."""
    names = [f"la_{index + 1:03d}.nii.gz" for index in range(cases + 2)]
    affine = np.diag([2.5, 2.5, 1.37, 1.0])
    for index, name in enumerate(names):
        volume, label = _heart_volume(np.random.default_rng([seed, index]), shape)
        _save_volume(volume, affine, folder / ("imagesTr" if index < cases else "imagesTs") / name)
        if index < cases:
            _save_volume(label, affine, folder / "labelsTr" / name)
    content = {
        "description": "Left atrium segmentation: generated phantoms, no patient data",
        "labels": {"0": "background", "1": "left atrium"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names[:cases]],
        "test": [f"./imagesTs/{name}" for name in names[cases:]],
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _heart_volume(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw a left atrium with vein stubs between organs of its brightness: volume int16 and label, both (X, Y, Z)."""
    shape = (shape[0], shape[1], shape[2] + int(rng.integers(-8, 9)))
    axes = [np.linspace(-half, half, n) for half, n in zip((24.0, 119.0, 68.0), shape, strict=True)]
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


def _save(array: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path, **options)


def _save_volume(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    import nibabel

    path.parent.mkdir(exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)


def _write_table(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _levels(image: np.ndarray) -> np.ndarray:
    """Grey or colour levels of an image in [0, 1]."""
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _sides(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int]:
    """Draw height and width between the smallest and the largest side; the width is larger."""
    middle = sum(size) // 2
    return int(rng.integers(size[0], middle)), int(rng.integers(middle, size[1] + 1))


def _outline(rng: np.random.Generator, angle: np.ndarray, roughness: float, lobes: Sequence[int]) -> np.ndarray:
    """Relative radius by angle of a lobed outline."""
    waves = (rng.uniform(0, roughness / n) * np.cos(n * angle + rng.uniform(0, 2 * np.pi)) for n in lobes)
    return 1 + np.asarray(sum(waves))


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], knots: Sequence[int]) -> np.ndarray:
    """Noise of ``shape`` with mean 0 and deviation 1 that varies over about one knot distance per axis."""
    noise = rng.standard_normal(knots)
    for axis, (length, count) in enumerate(zip(shape, knots, strict=True)):
        noise = _weighted(noise, axis, np.linspace(0, count - 1, length)[:, None] - np.arange(count), 1.0)
    return (noise - noise.mean()) / noise.std()


def _grain(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Noise of ``shape`` with mean 0 and deviation 1 that varies over about ``sigma`` pixels."""
    noise = gaussian_filter(rng.standard_normal(shape), sigma)
    return (noise - noise.mean()) / noise.std()


def _blur(array: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur along every axis, ``sigma`` in samples."""
    for axis, length in enumerate(array.shape):
        distance = np.arange(length)[:, None] - np.arange(length)
        array = _weighted(array, axis, distance / sigma, 0.5)
    return array


def _weighted(array: np.ndarray, axis: int, distance: np.ndarray, factor: float) -> np.ndarray:
    """Replace the samples along an axis by means with Gaussian weights of their distances (out, in)."""
    weights = np.exp(-factor * distance**2)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, array, axes=(1, axis)), 0, axis)
