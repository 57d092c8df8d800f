"""ISIC 2017, part 1: the outline of the lesion, `ISIC-2017_<section>_Part1_GroundTruth/<id>_segmentation.png`."""

from __future__ import annotations

from pathlib import Path

from amkd_monai.data.duplicates import group_identical_images
from amkd_monai.data.isic2017 import BESIDE, OFFICIAL, check_layout, image_folder, inference_items, split
from amkd_monai.data.layout import mark_problem, picture_problem
from amkd_monai.data.splits import Item
from amkd_monai.files.names import files_by_id, some

__all__ = ["find_items", "inference_items", "split"]

MASK = "_segmentation"


def find_items(root: Path) -> list[Item]:
    """List all images whose section has masks; a section without a folder of masks is left out.

    Raises:
        FileNotFoundError: `root` has not the layout, there is no folder of masks, or an image has no mask.
        ValueError: a mask has no image.
    """
    root = Path(root)
    check_layout(root)
    items: list[Item] = []
    for section, name in OFFICIAL.items():
        masks, folder = root / f"ISIC-2017_{name}_Part1_GroundTruth", image_folder(root, name)
        if folder is None or not masks.is_dir():
            continue
        images = files_by_id(folder, beside=BESIDE)
        outlines = files_by_id(masks, ending=MASK)
        if lost := images.keys() - outlines.keys():
            raise FileNotFoundError(f"{masks} lacks the mask(s) of {some(lost)}: add them.")
        if alone := outlines.keys() - images.keys():
            raise ValueError(f"{folder} lacks the image(s) of the mask(s) {some(alone)}: add them.")
        for name, image in images.items():
            items.append(
                {"image": str(image), "label": str(outlines[name]), "id": name, "group": name, "section": section}
            )
            mark_problem(items[-1], picture_problem(image, [outlines[name]]))
    if not items:
        raise FileNotFoundError(f"No masks in {root}: expected ISIC-2017_Training_Part1_GroundTruth/*{MASK}.png.")
    return group_identical_images(items)
