"""Real images stored again in other ways must be read alike: array orders, EXIF orientations, depths, file kinds.

Prints the largest difference between what is read of the original and of each copy: levels of 256 for pictures, the
share of pixels for masks, grey values for volumes. Ends with exit code 1 if one is beyond its limit.

python benchmarks/stored_otherwise.py --data FOLDER [--count 6]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from amkd_monai.files.masks import read_mask
from amkd_monai.files.names import PICTURE_SUFFIXES, VOLUME_SUFFIXES, has_suffix
from amkd_monai.files.pictures import UNDONE, read_picture, turned
from amkd_monai.files.volumes import read_label_volume, read_volume, reorder

ORDERS = ("LPS", "LAS", "PIR", "ASL", "SPL", "SRA", "IPL")


def spread(files: list[Path], count: int) -> list[Path]:
    """Evenly spaced files."""
    return [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).astype(int))]


def pictures(files: list[Path], folder: Path) -> dict[str, float]:
    """Largest difference of levels by way of storage."""
    worst: dict[str, float] = {}
    for file in files:
        pixels = read_picture(file)
        grey = pixels[..., 0]
        copies = {"png": (Image.fromarray(pixels), pixels), "tif": (Image.fromarray(pixels), pixels)}
        copies |= {
            "16 bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, 2)),
            "0 to 1.tif": (Image.fromarray(grey.astype(np.float32) / 255), np.repeat(grey[..., None], 3, 2)),
        }
        for kind, (image, expected) in copies.items():
            image.save(folder / f"copy.{kind}")
            found = read_picture(folder / f"copy.{kind}").astype(int)
            worst[kind] = max(worst.get(kind, 0.0), float(np.abs(found - expected).max()))
        for tag in range(2, 9):
            exif = Image.Exif()
            exif[0x0112] = tag
            Image.fromarray(np.ascontiguousarray(turned(pixels, UNDONE[tag]))).save(
                folder / "copy.png", exif=exif, compress_level=1
            )
            found = read_picture(folder / "copy.png").astype(int)
            worst[f"EXIF {tag}"] = max(worst.get(f"EXIF {tag}", 0.0), float(np.abs(found - pixels).max()))
    return worst


def masks(files: list[Path], folder: Path) -> dict[str, float]:
    """Largest share of pixels that differ by way of storage."""
    worst: dict[str, float] = {}
    for file in files:
        mask = read_mask([file])
        palette = Image.fromarray(mask)
        palette.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
        copies = {
            "0/1": Image.fromarray(mask),
            "1 bit": Image.fromarray(mask > 0),
            "16 bits": Image.fromarray(mask.astype(np.uint16) * 65535),
            "palette": palette,
            "red": Image.fromarray(mask[..., None] * np.array([200, 0, 0], np.uint8)),
        }
        for kind, image in copies.items():
            image.save(folder / "mask.png")
            worst[kind] = max(worst.get(kind, 0.0), float((read_mask([folder / "mask.png"]) != mask).mean()))
    return worst


def volumes(files: list[Path], folder: Path) -> dict[str, float]:
    """Largest difference of grey values by order of the array."""
    worst: dict[str, float] = {}
    for file in files:
        array, grid = read_volume(file)
        upright, image = reorder(array, grid, "RAS"), nibabel.load(file)
        for axes in ORDERS:
            turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
            nibabel.save(image.as_reoriented(turn), folder / "copy.nii")
            found, other = read_volume(folder / "copy.nii")
            away = float(np.abs(reorder(found, other, "RAS") - upright).max())
            if "labels" in file.parent.name:
                label, _ = read_label_volume(folder / "copy.nii", grid)
                away = max(away, float((label != read_label_volume(file)[0]).mean()))
            worst[axes] = max(worst.get(axes, 0.0), away)
    return worst


def main() -> int:
    """Read, store, read again, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of real images, at any depth")
    parser.add_argument("--count", type=int, default=6, help="files of each kind")
    options = parser.parse_args()
    files = [f for f in sorted(options.data.rglob("*")) if f.is_file() and not f.name.startswith("._")]
    is_mask = [f for f in files if has_suffix(f, PICTURE_SUFFIXES) and "mask" in f"{f.parent.name}/{f.name}".lower()]
    is_picture = [f for f in files if has_suffix(f, PICTURE_SUFFIXES) and "mask" not in str(f).lower()]
    is_picture = [f for f in is_picture if "GroundTruth" not in str(f) and "GT" not in f.parts]
    is_volume = [f for f in files if has_suffix(f, VOLUME_SUFFIXES)]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, chosen, compare in (
            ("pictures, levels", is_picture, pictures),
            ("masks, share of pixels", is_mask, masks),
            ("volumes, grey values", is_volume, volumes),
        ):
            used = spread(chosen, options.count) if chosen else []
            print(f"{name} ({len(used)} of {len(chosen)} files)")
            for way, worst in compare(used, Path(folder)).items():
                failed |= worst > 0
                print(f"  {way:<12} {worst:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
