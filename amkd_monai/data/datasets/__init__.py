"""The data sets: classes, layout, source. This table is the only registration."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from amkd_monai.data import phantoms
from amkd_monai.data.datasets.described import Described, named
from amkd_monai.data.splits import NEAR, Item
from amkd_monai.files.names import read_text
from amkd_monai.storage import atomic_folder

PHANTOM_MARKER = "PHANTOM.txt"
KINDS = ("segmentation", "classification", "multilabel")
MOST_CLASSES = 255  # labels are bytes, of which the last means that there is no label
MOST_FINDINGS = 62  # they are the bits of a number


def is_phantom(folder: str | Path) -> bool:
    """Whether a data set folder holds generated data."""
    return (Path(folder) / PHANTOM_MARKER).is_file()


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        terms: its licence in a sentence.
        files: addresses with checksums, ``sha256:...`` or ``md5:...``; None where none is known, never of an archive.
        inside: whether archives are unpacked inside the data set's folder; otherwise they bring it along.
        steps: what to do by hand where there are no ``files``.
    """

    terms: str
    files: tuple[tuple[str, str | None], ...] = ()
    inside: bool = False
    steps: str = ""


@dataclass(frozen=True)
class Task:
    """One prediction task on one data set.

    Attributes:
        name: key in `TASKS`, also the name of the bundle unless a bundle serves several tasks.
        classes: class names by label value; in segmentation index 0 is "background".
        modality: how the images were made.
        folder: the folder name the data set has when it is unpacked as published.
        prompts: one text prompt for each of `classes[1:]`.
        kind: what is predicted; "segmentation" is one class index per pixel or voxel, "classification" one per image,
            "multilabel" whether each of `classes`, the findings, is there, as the bits of a number per image.
        dimensions: spatial dimensions of an image, 2 or 3.
        primary_metric: the metric that selects the best checkpoint.
        nsd_tolerance: of the normalised surface distance, in `unit`, one or by name of each class and region.
        regions: foreground classes that are also scored together, by name, as {"whole tumour": (1, 2, 3)}.
        referable_from: classes are ordered grades, and this is the first one at which a patient is referred.
        singled_out: classes that are judged one against all others, as in two binary problems.
        mask_codes: what the values of mask files mean, see `amkd_monai.files.masks.decode`.
        values: what the images hold: "levels" of pictures, "any" scale (MRI, taken by percentiles), or "ct".
        channels: names of the files that make one image, in their order; () where an image is one file.
        teacher_channels: one or three of them, which teachers are shown as a grey image (of volumes as a slice and its
            neighbours) or as RGB; () for the first of a volume, the first three of a picture.
        grid_limit: cells a side of foundation teachers' feature maps that are kept.
        teacher_options, seen_by: options of foundation teachers, and whether they saw these images in training, by
            kind, where the rules of `amkd_monai.teachers.plan` are not right.
        layout: finds the items of a folder and splits them.
        source: where the data come from.
        phantom: fills an empty folder with generated data in the layout; None: the data set has none.
        description: the content of the file that describes the task; None for those of `TASKS`.
    """

    name: str
    classes: tuple[str, ...]
    modality: str
    folder: str
    prompts: tuple[str, ...]
    kind: str = "segmentation"
    dimensions: int = 2
    primary_metric: str = "dice"
    nsd_tolerance: float | Mapping[str, float] = 2.0
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    referable_from: int | None = None
    singled_out: tuple[str, ...] = ()
    mask_codes: str | Mapping[str, int | str] = "auto"
    values: str = "levels"
    channels: tuple[str, ...] = ()
    teacher_channels: tuple[str, ...] = ()
    grid_limit: int = 16
    teacher_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seen_by: Mapping[str, str] = field(default_factory=dict)
    layout: Described = field(default_factory=Described)
    source: Source | None = None
    phantom: Callable[..., None] | None = None
    description: Mapping[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What records of a run hold of the task; :func:`recorded_task` finds it again."""
        return {"task": self.name, **({} if self.description is None else {"description": self.description})}

    def __post_init__(self) -> None:
        scored, labels = [*self.classes[1:], *self.regions], range(1, len(self.classes))
        if self.has_findings and any("|" in name for name in self.classes):
            raise ValueError(f"The task '{self.name}' has findings with | in their names: write others.")
        wrong = [name for name, of in self.regions.items() if not of or isinstance(of, str) or not {*of} <= {*labels}]
        if len(self.classes) > (most := MOST_FINDINGS if self.has_findings else MOST_CLASSES):
            raise ValueError(f"The task '{self.name}' has {len(self.classes)} classes: give at most {most}.")
        if wrong or len(set(scored)) < len(scored):
            wanted = f"a name of its own and some of the labels 1 to {len(labels)}"
            raise ValueError(f"The task '{self.name}' has the regions {dict(self.regions)}: give each {wanted}.")
        if isinstance(self.nsd_tolerance, Mapping) and {*self.nsd_tolerance} != {*scored}:
            wanted = f"one number, or one for each of {', '.join(scored)}"
            raise ValueError(f"nsd_tolerance of the task '{self.name}' is {dict(self.nsd_tolerance)}: give {wanted}.")
        if self.channels or self.teacher_channels:
            named, shown = self.channels, self.teacher_channels
            if len(named) < 2 or len({*named}) < len(named) or not {*shown} <= {*named} or len(shown) not in (0, 1, 3):
                has = f"the channels {named}, for teachers {shown}"
                raise ValueError(f"The task '{self.name}' has {has}: give two names or more, one or three to teachers.")

    @property
    def shown_channels(self) -> tuple[int, ...]:
        """Indices of the channels that teachers are shown, () where an image is one file."""
        first = 3 if self.dimensions == 2 and len(self.channels) > 2 else 1
        return tuple(self.channels.index(name) for name in self.teacher_channels or self.channels[:first])

    @property
    def is_classification(self) -> bool:
        """Whether labels are about whole images: one class, or findings."""
        return self.kind != KINDS[0]

    @property
    def has_findings(self) -> bool:
        """Whether an image has any number of the classes."""
        return self.kind == "multilabel"

    @property
    def answers(self) -> tuple[str, ...]:
        """What is told apart at each place, by the channels of logits."""
        return ("absent", "present") if self.has_findings else self.classes

    @property
    def per_image(self) -> int:
        """Answers about a whole image: 1 class, or the number of findings; 0 of masks."""
        return len(self.classes) if self.has_findings else int(self.is_classification)

    def text_of(self, label: int) -> str:
        """Return the name of an image's class, or those of its findings joined by "|"."""
        return Described(classes=self.classes, kind=self.kind).text_of(label)

    @property
    def unit(self) -> str:
        """Unit of distances, "px" (pixels) or "mm"."""
        return "px" if self.dimensions == 2 else "mm"

    @property
    def size_unit(self) -> str:
        """Unit of areas and volumes."""
        return "pixels" if self.dimensions == 2 else "mm³"

    def write_phantom(self, root: str | Path, **options: object) -> Path:
        """Write generated data to ``root/<folder>``, whole or not at all, unless they are there; return that folder.

        A folder with other data is a FileExistsError.
        """
        target = Path(root) / self.folder
        if self.phantom is None:
            raise FileNotFoundError(f"There are no phantoms of '{self.name}': give data.")
        if not is_phantom(target):
            with atomic_folder(target) as folder:
                self.phantom(folder, **options)
                (folder / PHANTOM_MARKER).write_text("Generated by amkd_monai.data.phantoms, no patient data.\n")
        return target


_KVASIR = "https://datasets.simula.no/downloads/kvasir-seg.zip"
_HEART = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task02_Heart.tar"
_ISIC = "https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_"
_ISIC_SUMS = {
    "Training_Data.zip": "md5:a14a7e622c67a358797ae59abb8a0b0c",
    "Training_Part1_GroundTruth.zip": "md5:77fdbeb6fbec4139937224416b250f4c",
    "Training_Part3_GroundTruth.csv": "md5:0cb4add57c65c22ca1a1cb469ad1f0c5",
    "Validation_Data.zip": "md5:8d6419d942112f709894c0d82f6c9038",
    "Validation_Part1_GroundTruth.zip": "md5:64d3e68fa2deeb8a5e89aa8dec2efd44",
    "Validation_Part3_GroundTruth.csv": "md5:8d4826a76adcd8fb928ca52a23ebae4c",
    "Test_v2_Data.zip": "md5:5f6a0b5e1f2972bd1f5ea02680489f09",
    "Test_v2_Part1_GroundTruth.zip": "md5:b1742de6bd257faca3b2b21a4aa3b781",
    "Test_v2_Part3_GroundTruth.csv": None,
}
_ISIC_SOURCE = Source("CC-0.", tuple((_ISIC + name, checksum) for name, checksum in _ISIC_SUMS.items()), inside=True)
_ISIC_CLASSES = ("nevus", "melanoma", "seborrheic keratosis")
_ISIC_LAYOUT: dict[str, Any] = {
    "title": "ISIC 2017",
    "beside": ("_superpixels", "_segmentation"),
    "predict_in": [f"ISIC-2017_{name}_Data" for name in ("Test_v2", "Validation", "Training")],
    "validation_fraction": 0.2,
}
_GRADES = ("no DR", "mild", "moderate", "severe", "proliferative")
_PROLIFERATIVE = ("proliferate", "proliferateDR", "proliferativeDR")
_COVID_SECTIONS = {"train": "TrainingSet/LungInfection-Train/Doctor-label", "test": "TestingSet/LungInfection-Test"}


def _isic_sections(labels: str) -> dict[str, tuple[str, str]]:
    """The folder of images and the masks or table of each section."""
    names = {"train": "Training", "validation": "Validation", "test": "Test_v2"}
    return {section: (f"ISIC-2017_{name}_Data", f"ISIC-2017_{name}_{labels}") for section, name in names.items()}


@dataclass(frozen=True)
class Busi(Described):
    """BUSI, whose images of normal tissue, with empty masks, can be left out."""

    def find_items(
        self,
        root: Path,
        cache_dir: str | Path | None = None,
        folders: Sequence[str] | None = None,
        mask_ending: str = "",
        duplicate_distance: int | None = None,
        normals: bool = True,
    ) -> list[Item]:
        """List the images as :class:`Described` does; ``normals`` keeps those without a lesion."""
        kept = self if normals else replace(self, folders=self.folders[:2])
        return Described.find_items(kept, root, cache_dir, folders, mask_ending, duplicate_distance)


_TASKS = (
    # Al-Dhabyani et al., "Dataset of breast ultrasound images", Data in Brief 28:104863, 2020. Further masks `_mask_1`,
    # `_mask_2` show one lesion each. Many images come twice, with and without calipers (Pawlowska et al. 2023,
    # PMC10293973): 64 bits join copies and frames of one lesion. Folds hold the classes in equal shares.
    Task(
        name="busi",
        modality="ultrasound",
        classes=("background", "lesion"),
        folder="Dataset_BUSI_with_GT",
        prompts=("breast lesion in ultrasound",),
        layout=Busi(
            title="BUSI",
            form="pairs",
            folders=(("benign", "benign"), ("malignant", "malignant"), ("normal", "normal")),
            strata=True,
            pattern=r".+ \(\d+\)",
            mask_ending="_mask",
            duplicate_distance=64,
            validation_fraction=0.15,
            expected="the folders benign/, malignant/ and normal/ with `<class> (N).png` and `<class> (N)_mask.png`",
        ),
        phantom=phantoms.busi,
        source=Source(
            "No licence of the data is known.",
            steps="Download Dataset_BUSI.zip from https://scholar.cu.edu.eg/?q=afahmy/pages/dataset and unpack it; it "
            "holds Dataset_BUSI_with_GT/.",
        ),
    ),
    # Slices with infection masks: COVID-SemiSeg (Fan et al., "Inf-Net", IEEE TMI 2020, from the slices of
    # medicalsegmentation.com) or two folders. There are no patient ids, so slices of one patient that do not look alike
    # may lie in several sections. Masks of several classes (ground glass, consolidation, effusion) are merged.
    Task(
        name="covid",
        modality="CT",
        classes=("background", "infection"),
        folder="COVID",
        mask_codes="nonzero",
        seen_by={"biomedparse": "possible, a COVID-19 CT set is in its list"},
        prompts=("COVID-19 infection in chest CT",),
        phantom=phantoms.covid,
        layout=Described(
            title="COVID",
            form="pairs",
            folders=(("images", "masks"), ("frames", "masks")),
            duplicate_distance=NEAR,
            expected="the folders of COVID-SemiSeg (TrainingSet/, TestingSet/), or images/ and masks/ with one file "
            "each per slice",
            official={name: (f"{place}/Imgs", f"{place}/GT") for name, place in _COVID_SECTIONS.items()},
            predict_in=(f"{_COVID_SECTIONS['test']}/Imgs", "images", "frames", "Imgs"),
        ),
        source=Source(
            "COVID-SemiSeg is for non-commercial use only.",
            steps="Follow https://github.com/DengPingFan/Inf-Net to COVID-SemiSeg.zip and unpack it as COVID/, so that "
            "COVID/TrainingSet and COVID/TestingSet are there.",
        ),
    ),
    # The 20 cases of Ma et al., https://zenodo.org/records/3757476, or two folders of NIfTI files.
    Task(
        name="covid_volumes",
        modality="CT",
        classes=("background", "infection"),
        folder="COVID-volumes",
        dimensions=3,
        values="ct",
        seen_by={"biomedparse": "possible, a COVID-19 CT set is in its list"},
        prompts=("COVID-19 infection in chest CT",),
        nsd_tolerance=3.0,
        phantom=phantoms.covid_volumes,
        mask_codes={"0": 0, "1": 1, "2": 1, "3": 1},
        layout=Described(
            title="COVID CT volume",
            form="pairs",
            volumes=True,
            expected="COVID-19-CT-Seg_20cases/ and Infection_Mask/, imagesTr/ and labelsTr/, or images/ and masks/ "
            "with one NIfTI file each per volume",
            folders=(("COVID-19-CT-Seg_20cases", "Infection_Mask"), ("imagesTr", "labelsTr"), ("images", "masks")),
            predict_in=("COVID-19-CT-Seg_20cases", "imagesTr", "images"),
        ),
        source=Source(
            "See the page for the terms of each of its three sources.",
            steps="Download COVID-19-CT-Seg_20cases.zip and Infection_Mask.zip from "
            "https://zenodo.org/records/3757476 and unpack each into a folder of its name in COVID-volumes/.",
        ),
    ),
    # Jha et al., "Kvasir-SEG: A Segmented Polyp Dataset", MMM 2020. Masks are RGB JPEGs with values between 0 and 255
    # around every edge. The authors' later 880/120 split exists as file lists.
    Task(
        name="kvasir_seg",
        modality="endoscopy",
        classes=("background", "polyp"),
        folder="Kvasir-SEG",
        prompts=("polyp in endoscopy",),
        phantom=phantoms.kvasir_seg,
        layout=Described(
            title="Kvasir-SEG",
            form="pairs",
            folders=(("images", "masks"),),
            file_lists=("train.txt", "val.txt"),
            expected="the folders images/ and masks/ with one file each per image",
        ),
        source=Source(
            "Research and education only; anything else needs the owners' permission. Cite Jha et al., MMM 2020.",
            ((_KVASIR, "sha256:03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7"),),
        ),
    ),
    Task(
        name="msd_heart",
        modality="MRI",
        classes=("background", "left atrium"),
        folder="Task02_Heart",
        dimensions=3,
        values="any",
        seen_by={"biomedparse": "yes, the Decathlon is in its list"},
        prompts=("left atrium in cardiac MRI",),
        phantom=phantoms.msd_heart,
        # Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 2022. Two training images
        # (la_005, la_026) were seen to be byte-identical while their labels differ. 20 labelled hearts are too few for
        # one fixed test section.
        layout=Described(
            title="MSD Heart",
            classes=("background", "left atrium"),
            volumes=True,
            form="datalist",
            file="dataset.json",
            validation_fraction=0.1,
            expected="dataset.json with the folders imagesTr/ and labelsTr/ next to it",
        ),
        source=Source("CC-BY-SA 4.0.", ((_HEART, "md5:06ee59366e1e5124267b774dbd654057"),)),
    ),
    # Kaggle, "APTOS 2019 Blindness Detection": grades 0 to 4 of diabetic retinopathy. The original's `test.csv` has no
    # grades; a re-split of the same images has three tables with grades; others have a folder per grade.
    Task(
        name="aptos2019",
        kind="classification",
        modality="fundus photography",
        classes=_GRADES,
        folder="aptos2019-blindness-detection",
        primary_metric="qwk",
        referable_from=2,
        prompts=tuple(f"{grade} diabetic retinopathy" for grade in _GRADES[1:]),
        layout=Described(
            title="APTOS 2019",
            kind="classification",
            classes=_GRADES,
            official={
                "train": (("train_images", "train"), ("train_1.csv", "train.csv")),
                "validation": (
                    ("val_images", "valid_images", "validation_images", "val", "valid", "validation"),
                    ("valid.csv", "val.csv", "validation.csv"),
                ),
                "test": (("test_images", "test"), "test.csv"),
            },
            columns={"image": "id_code", "label": "diagnosis"},
            aliases={"normal": _GRADES[0], **dict.fromkeys(_PROLIFERATIVE, _GRADES[4])},
            validation_fraction=0.2,
            expected="train.csv (id_code,diagnosis) with train_images/<id_code>.png, three such tables, or a folder "
            "per grade",
            predict_in=("test_images", "test", "val_images", "valid", "train_images", "train"),
        ),
        phantom=phantoms.aptos2019,
        source=Source(
            "The rules of the competition allow non-commercial and academic use and no passing on.",
            steps="Accept the rules at https://www.kaggle.com/competitions/aptos2019-blindness-detection, then: kaggle "
            "competitions download -c aptos2019-blindness-detection, and unpack into a folder of that name.",
        ),
    ),
    # Codella et al., "Skin Lesion Analysis Toward Melanoma Detection", ISBI 2017: classes are part 3, outlines part 1.
    Task(
        name="isic2017",
        kind="classification",
        modality="dermoscopy",
        classes=_ISIC_CLASSES,
        folder="ISIC2017",
        prompts=tuple(f"{name} in dermoscopy" for name in _ISIC_CLASSES[1:]),
        seen_by={"medsam": "possible", "biomedparse": "possible"},
        primary_metric="mean_auc",
        singled_out=_ISIC_CLASSES[1:],
        layout=Described(
            **_ISIC_LAYOUT,
            kind="classification",
            classes=_ISIC_CLASSES,
            form="table",
            official=_isic_sections("Part3_GroundTruth.csv"),
            columns={"image": "image_id", "label": ("melanoma", "seborrheic_keratosis")},
            expected="ISIC-2017_Training_Data/ISIC_XXXXXXX.jpg and ISIC-2017_Training_Part3_GroundTruth.csv",
        ),
        phantom=phantoms.isic2017,
        source=_ISIC_SOURCE,
    ),
    Task(
        name="isic2017_lesion",
        modality="dermoscopy",
        classes=("background", "lesion"),
        folder="ISIC2017",
        prompts=("skin lesion in dermoscopy",),
        layout=Described(
            **_ISIC_LAYOUT,
            form="pairs",
            official=_isic_sections("Part1_GroundTruth"),
            mask_ending="_segmentation",
            expected="ISIC-2017_Training_Data/ISIC_XXXXXXX.jpg and ISIC-2017_Training_Part1_GroundTruth/",
        ),
        phantom=phantoms.isic2017,
        source=_ISIC_SOURCE,
    ),
)
TASKS = {task.name: task for task in _TASKS}
Named = str | Path | Mapping[str, Any] | Task
"""A task, or what :func:`get_task` finds it by."""


def get_task(task: Named) -> Task:
    """Return a task of `TASKS` by its name, or one that a JSON file (by its path) or its content describes.

    The keys of a description are the plain attributes of :class:`Task`, of which ``name`` and ``classes`` are needed,
    ``folder`` (of the data, relative to the file), and ``layout``, the attributes of
    :class:`~amkd_monai.data.datasets.described.Described`. Raises a ValueError or, without the file, FileNotFoundError.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return _described(task, "The description of the task", Path())
    if (name := str(task)) in TASKS:
        return TASKS[name]
    if not name.endswith(".json"):
        known = ", ".join(sorted(TASKS))
        raise ValueError(f"Unknown task '{name}': use one of {known}, or the path of a description (.json).")
    if not (file := Path(name).expanduser()).is_file():
        raise FileNotFoundError(f"There is no description of a task at {file}: correct `task`.")
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): correct it.") from error
    return _described(content, str(file), file.parent)


def recorded_task(record: Mapping[str, Any]) -> Task:
    """Return the task of a record that holds its :attr:`Task.identity`."""
    return get_task(record.get("description") or str(record.get("task")))


def _described(content: Any, where: str, base: Path) -> Task:
    """Make the task of a description, whose folder is relative to ``base``; ``where`` names it in messages."""

    def refuse(what: str) -> ValueError:
        return ValueError(f"{where} {what}: correct it.")

    plain = {f.name for f in fields(Task)} - {"layout", "source", "phantom", "description"}
    if not isinstance(content, Mapping) or not {"name", "classes"} <= content.keys() <= plain | {"layout"}:
        raise refuse(f"is not an object of name, classes, optionally {', '.join(sorted(plain - {'name'}))}, layout")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k != "layout"}
    values["folder"] = str((base / values["folder"]).resolve()) if "folder" in values else values.get("name")
    name, classes = values["name"], values["classes"]
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name in TASKS:
        raise refuse(f"has the name {name!r}, which must be of letters, digits, _ . - and none of {', '.join(TASKS)}")
    texts = isinstance(classes, tuple) and all(isinstance(c, str) and c for c in classes)
    if not texts or len(set(classes)) < max(2, len(classes)):
        raise refuse(f"has the classes {classes!r}, which must be at least two different names")
    kind, dimensions = values.get("kind", KINDS[0]), values.get("dimensions", 2)
    if kind not in KINDS or dimensions not in (2, 3) or (kind != KINDS[0] and dimensions == 3):
        raise refuse(f"has the kind {kind!r} in {dimensions!r} dimensions, not one of {', '.join(KINDS)} in 2")
    if kind != KINDS[0] and len({named(c) for c in classes}) < len(classes):
        raise refuse(f"has the classes {classes!r}, which must differ in more than case and signs")
    modality = values.get("modality", "image")
    defaults: dict[str, Any] = {"modality": modality, "prompts": tuple(f"{c} in {modality}" for c in classes[1:])}
    values = defaults | ({} if kind == KINDS[0] else {"primary_metric": "macro_auroc"}) | values
    if len(values["prompts"]) != len(classes) - 1:
        raise refuse(f"has {len(values['prompts'])} prompts for {len(classes) - 1} classes after the first")
    options = content.get("layout", {})
    of_the_task = {"title", "classes", "kind", "volumes", "channels", "validation_fraction", "expected", "predict_in"}
    known = {f.name for f in fields(Described)} - of_the_task
    if not isinstance(options, Mapping) or not options.keys() <= known:
        raise refuse(f"has a layout that is not an object of {', '.join(sorted(known))}")
    fixed: dict[str, Any] = {"volumes": dimensions == 3, "channels": max(1, len(values.get("channels", ())))}
    try:
        re.compile(str(options.get("groups", "")))
        layout = Described(title=name, classes=classes, kind=kind, **fixed, **options)
        return Task(layout=layout, description=dict(content), **values)
    except re.error as error:
        raise refuse(f"has an invalid pattern of groups ({error})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
