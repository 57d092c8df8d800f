"""Data sets: classes, layout, source. Those of the project are the JSON files of this folder."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from amkd_monai.data import phantoms
from amkd_monai.data.datasets.described import Described, named
from amkd_monai.storage import atomic_folder, read_json

PHANTOM_MARKER = "PHANTOM.txt"
KINDS = ("segmentation", "classification", "multilabel")
MOST_CLASSES = 255  # labels are bytes, of which the last means that there is no label
MOST_FINDINGS = 62  # they are the bits of a number


def is_phantom(folder: str | Path) -> bool:
    """Whether a data set folder holds generated data."""
    return (Path(folder) / PHANTOM_MARKER).is_file()


@dataclass(frozen=True)
class Source:
    """Where a data set comes from."""

    terms: str  # its licence in a sentence
    files: tuple[tuple[str, str | None], ...] = ()
    """Addresses with checksums, ``sha256:...`` or ``md5:...``; None where none is known, never of an archive."""
    inside: bool = False  # whether archives are unpacked inside the data set's folder; otherwise they bring it along
    steps: str = ""  # what to do by hand where there are no files


@dataclass(frozen=True)
class Task:
    """One prediction task on one data set."""

    name: str  # key in `TASKS`, also the name of the bundle unless a bundle serves several tasks
    classes: tuple[str, ...]  # names by label value; in segmentation index 0 is "background"
    modality: str  # how the images were made
    folder: str  # the folder name the data set has when it is unpacked as published
    prompts: tuple[str, ...]  # one text prompt for each of `classes[1:]`
    # "segmentation" is one class index per pixel or voxel, "classification" one per image, "multilabel" whether each of
    # `classes`, the findings, is there, as the bits of a number per image
    kind: str = "segmentation"
    dimensions: int = 2  # spatial dimensions of an image, 2 or 3
    primary_metric: str = "dice"  # the metric that selects the best checkpoint
    # of the normalised surface distance, in `unit`, one or by name of each class and region
    nsd_tolerance: float | Mapping[str, float] = 2.0
    # foreground classes that are also scored together, by name, as {"whole tumour": (1, 2, 3)}
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    referable_from: int | None = None  # classes are ordered grades; the first one at which a patient is referred
    singled_out: tuple[str, ...] = ()  # classes that are judged one against all others, as in two binary problems
    # what the values of mask files mean, see `amkd_monai.files.masks.decode`
    mask_codes: str | Mapping[str, int | str] = "auto"
    values: str = "levels"  # of images: "levels" of pictures, "any" scale (MRI, taken by percentiles), or "ct"
    channels: tuple[str, ...] = ()  # names of the files that make one image, in order; () where an image is one file
    # one or three channels, which teachers are shown as a grey image (of volumes as a slice and its neighbours) or as
    # RGB; () for the first of a volume, the first three of a picture
    teacher_channels: tuple[str, ...] = ()
    grid_limit: int = 16  # cells a side of foundation teachers' feature maps that are kept
    # options of foundation teachers, and whether they saw these images in training, by kind, where the rules of
    # `amkd_monai.teachers.plan` are not right
    teacher_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seen_by: Mapping[str, str] = field(default_factory=dict)
    layout: Described = field(default_factory=Described)  # finds the items of a folder and splits them
    source: Source | None = None
    phantom: Callable[..., None] | None = None  # fills an empty folder with generated data in the layout
    description: Mapping[str, Any] | None = None  # content of the file that describes the task; None in `TASKS`

    @property
    def identity(self) -> dict[str, Any]:
        """What records of a run hold of the task; :func:`recorded_task` finds it again."""
        return {"task": self.name, **({} if self.description is None else {"description": self.description})}

    def __post_init__(self) -> None:
        of_layout: dict[str, Any] = {"classes": self.classes, "kind": self.kind, "volumes": self.dimensions == 3}
        of_layout |= {"channels": max(1, len(self.channels)), "title": self.layout.title or self.name}
        object.__setattr__(self, "layout", replace(self.layout, **of_layout))
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
        return self.layout.text_of(label)

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


TASKS: dict[str, Task] = {}
"""The data sets of the project by name, read from the JSON files beside this one."""
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
    return _described(read_json(file), str(file), file.parent)


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
    known = {f.name for f in fields(Described)} - {"classes", "kind", "volumes", "channels"}
    if not isinstance(options, Mapping) or not options.keys() <= known:
        raise refuse(f"has a layout that is not an object of {', '.join(sorted(known))}")
    try:
        re.compile(str(options.get("groups", "")))
        return Task(layout=Described(**options), description=dict(content), **values)
    except re.error as error:
        raise refuse(f"has an invalid pattern of groups ({error})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_tasks() -> None:
    """Fill :data:`TASKS`. Besides a description's keys, the files have "about", "source" and "phantom"."""
    for file in sorted(Path(__file__).parent.glob("*.json")):
        content = read_json(file)
        _, source, phantom = (content.pop(key) for key in ("about", "source", "phantom"))
        if isinstance(source, str):  # the name of another task
            source = TASKS[source].source
        else:
            source = Source(**{**source, "files": tuple(source.get("files", {}).items())})
        own = {"folder": content["folder"], "source": source, "phantom": getattr(phantoms, phantom)}
        TASKS[content["name"]] = replace(_described(content, str(file), Path()), description=None, **own)


_read_tasks()
