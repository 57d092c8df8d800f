"""What each data set asks for: plain data that every floor above may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One prediction task on one data set.

    Attributes:
        name: key in `TASKS`, also the name of the bundle unless a bundle serves several tasks.
        kind: what is predicted; "segmentation" is one class index per pixel or voxel, "classification" one per image.
        dimensions: spatial dimensions of an image, 2 or 3.
        classes: class names by label value; in segmentation index 0 is "background".
        modality: how the images were made.
        folder: the folder name the data set has when it is unpacked as published.
        prompts: one text prompt for each of `classes[1:]`.
        primary_metric: the metric that selects the best checkpoint.
        nsd_tolerance: tolerance of the normalised surface distance, in `unit` (segmentation).
        unit: unit of distances, "px" (pixels) or "mm" (segmentation).
        referable_from: classes are ordered grades, and this is the first one at which a patient is referred.
        singled_out: classes that are judged one against all others, as in two binary problems.
        mask_codes: what the values of mask files mean, see `amkd_monai.files.masks.decode`.
        values: what the images hold: "levels" of pictures, "any" scale (MRI, taken by percentiles), or "ct".
    """

    name: str
    kind: str
    dimensions: int
    classes: tuple[str, ...]
    modality: str
    folder: str
    prompts: tuple[str, ...]
    primary_metric: str
    nsd_tolerance: float = 0.0
    unit: str = "px"
    referable_from: int | None = None
    singled_out: tuple[str, ...] = ()
    mask_codes: str | Mapping[str, int | str] = "auto"
    values: str = "levels"

    @property
    def is_classification(self) -> bool:
        """Whether an image has one class."""
        return self.kind == "classification"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="busi",
            kind="segmentation",
            dimensions=2,
            classes=("background", "lesion"),
            modality="ultrasound",
            folder="Dataset_BUSI_with_GT",
            prompts=("breast lesion in ultrasound",),
            primary_metric="dice",
            nsd_tolerance=2.0,
            unit="px",
        ),
        Task(
            name="covid",
            kind="segmentation",
            dimensions=2,
            classes=("background", "infection"),
            modality="CT",
            folder="COVID",
            prompts=("COVID-19 infection in chest CT",),
            primary_metric="dice",
            nsd_tolerance=2.0,
            unit="px",
            mask_codes="nonzero",
        ),
        Task(
            name="covid_volumes",
            kind="segmentation",
            dimensions=3,
            classes=("background", "infection"),
            modality="CT",
            folder="COVID-volumes",
            prompts=("COVID-19 infection in chest CT",),
            primary_metric="dice",
            nsd_tolerance=3.0,
            unit="mm",
            mask_codes={"0": 0, "1": 1, "2": 1, "3": 1},
            values="ct",
        ),
        Task(
            name="kvasir_seg",
            kind="segmentation",
            dimensions=2,
            classes=("background", "polyp"),
            modality="endoscopy",
            folder="Kvasir-SEG",
            prompts=("polyp in endoscopy",),
            primary_metric="dice",
            nsd_tolerance=2.0,
            unit="px",
        ),
        Task(
            name="msd_heart",
            kind="segmentation",
            dimensions=3,
            classes=("background", "left atrium"),
            modality="MRI",
            folder="Task02_Heart",
            prompts=("left atrium in cardiac MRI",),
            primary_metric="dice",
            nsd_tolerance=2.0,
            unit="mm",
            values="any",
        ),
        Task(
            name="aptos2019",
            kind="classification",
            dimensions=2,
            classes=("no DR", "mild", "moderate", "severe", "proliferative"),
            modality="fundus photography",
            folder="aptos2019-blindness-detection",
            prompts=tuple(f"{grade} diabetic retinopathy" for grade in ("mild", "moderate", "severe", "proliferative")),
            primary_metric="qwk",
            referable_from=2,
        ),
        Task(
            name="isic2017",
            kind="classification",
            dimensions=2,
            classes=("nevus", "melanoma", "seborrheic keratosis"),
            modality="dermoscopy",
            folder="ISIC2017",
            prompts=("melanoma in dermoscopy", "seborrheic keratosis in dermoscopy"),
            primary_metric="mean_auc",
            singled_out=("melanoma", "seborrheic keratosis"),
        ),
        Task(
            name="isic2017_lesion",
            kind="segmentation",
            dimensions=2,
            classes=("background", "lesion"),
            modality="dermoscopy",
            folder="ISIC2017",
            prompts=("skin lesion in dermoscopy",),
            primary_metric="dice",
            nsd_tolerance=2.0,
            unit="px",
        ),
    )
}


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        ValueError: no such task; the message lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task '{name}': use one of {', '.join(sorted(TASKS))}.")
    return TASKS[name]
