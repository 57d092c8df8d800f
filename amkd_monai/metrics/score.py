"""Score masks of any program against references: `score`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from amkd_monai.data.datasets import Task, get_task
from amkd_monai.files import names, volumes
from amkd_monai.files.masks import IGNORED, MaskCodes, coding_problem, other_size, read_mask
from amkd_monai.files.names import some
from amkd_monai.metrics.segmentation import mask_rows
from amkd_monai.metrics.summary import FIGURES, Row, figures_of, write_figures
from amkd_monai.storage import read_json
from amkd_monai.terminal import logger, progress

ENDINGS = ("_mask", "_segmentation", "_seg", "_pred", "_prediction")
"""What the name of a mask may have behind that of its image."""


def task_of(classes: Sequence[str], folder: Path) -> Task:
    """Describe masks of a folder by the names of their classes, background first."""
    if len(classes) < 2 or len(set(classes)) != len(classes) or not all(classes):
        raise ValueError(f"The classes are {list(classes)}: give different names, background first.")
    dimensions = 3 if any(names.has_suffix(file, names.VOLUME_SUFFIXES) for file in folder.iterdir()) else 2
    return get_task({"name": "masks", "classes": list(classes), "dimensions": dimensions})


def score(
    predictions: str | Path,
    references: str | Path,
    output: str | Path,
    task: str | Sequence[str],
    codes: Mapping[str, MaskCodes] | None = None,
    nsd_tolerance: float | None = None,
) -> str:
    """Score each mask of a folder against the reference of its name; write what an evaluation leaves, return its table.

    Args:
        predictions: folder of masks, pictures or NIfTI volumes.
        references: folder of the masks that they should be; a folder or partner that is missing is a FileNotFoundError.
        output: folder for ``per_case.csv`` and ``metrics.json``.
        task: a task, of masks, or the names of the classes, background first.
        codes: meaning of the values of ``predictions`` and ``references``, see :func:`..files.masks.decode`; masks that
            do not fit are a ValueError that names the first.
        nsd_tolerance: tolerance of the NSD in pixels or mm, in place of the task's.
    """
    folders = {"predictions": Path(predictions).expanduser(), "references": Path(references).expanduser()}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} of {name}: give a folder of masks.")
    if folders["predictions"].samefile(folders["references"]):
        raise ValueError(f"{predictions} is the folder of predictions and of references: give two folders.")
    asked = get_task(task) if isinstance(task, str) else task_of(task, folders["references"])
    asked = asked if nsd_tolerance is None else replace(asked, nsd_tolerance=nsd_tolerance)
    if asked.is_classification:
        raise ValueError(f"{asked.name} has one class per image: `score` compares masks.")
    data = {name: str(folder) for name, folder in folders.items()}
    out = Path(output).expanduser()
    if (out / "run.json").is_file() or read_json(out / FIGURES).get("data", data) != data:
        raise ValueError(f"{output} holds figures of a run or of other masks: give another --output.")
    pairs = paired(folders["predictions"], folders["references"], asked.dimensions)
    used: dict[str, MaskCodes] = {"references": asked.mask_codes, "predictions": "auto", **(codes or {})}
    codings: dict[str, set[str]] = {name: set() for name in folders}
    rows: list[Row] = []
    problems: list[str] = []
    for case, (made, truth) in progress(pairs.items(), desc="score", delay=1):
        try:
            rows += _case(asked, case, made, truth, used, codings)
        except (ValueError, OSError) as error:
            problems.append(str(error) if any(str(f) in str(error) for f in (made, truth)) else f"{made}: {error}")
    for problem in problems[1:]:
        logger.warning("%s", problem)
    if problems:
        raise ValueError(f"{len(problems)} of {len(pairs)} masks cannot be scored: {problems[0]}")
    for name, folder in folders.items():
        if problem := coding_problem(codings[name]):
            raise ValueError(f"{folder}: {problem}")
    figures = figures_of(asked, rows, {})
    return write_figures(out, rows, figures, {"data": data, "mask_codes": used})


def paired(predictions: Path, references: Path, dimensions: int) -> dict[str, tuple[Path, Path]]:
    """Map the id of each case to its two masks; what has no partner on the other side is named."""
    made, truth = _masks(predictions, dimensions), _masks(references, dimensions)
    for files, others, place in ((truth, made, predictions), (made, truth, references)):
        if alone := files.keys() - others.keys():
            where = f"{len(alone)} mask(s) of {files[min(alone)].parent} have no partner in {place}"
            raise FileNotFoundError(f"{where}: {some(alone)}; add or remove them.")
    return {case: (made[case], truth[case]) for case in sorted(truth)}


def _masks(folder: Path, dimensions: int) -> dict[str, Path]:
    """Map the id of a case, without an ending, to its mask."""
    suffixes = names.PICTURE_SUFFIXES if dimensions == 2 else names.VOLUME_SUFFIXES
    found: dict[str, Path] = {}
    ids = {file: names.file_id(file) for file in names.image_files(folder, suffixes)}
    cases = {file: name.removesuffix(next(filter(name.endswith, ENDINGS), "")) for file, name in ids.items()}
    names.warn_of_deeper(folder)
    for file, case in cases.items():
        if ids[file].endswith("_overlay") and case.removesuffix("_overlay") in cases.values():
            continue
        if (other := found.setdefault(case, file)) is not file:
            raise ValueError(f"{other} and {file} are both of the case '{case}': keep the masks alone in {folder}.")
    if not found:
        raise FileNotFoundError(f"There are no masks ({', '.join(suffixes)}) in {folder}.")
    return found


def _case(
    task: Task, case: str, made: Path, truth: Path, codes: Mapping[str, MaskCodes], codings: Mapping[str, set[str]]
) -> list[Row]:
    count = len(task.classes)
    spacing: Sequence[float] = (1.0, 1.0)
    of_truth, of_made = ((count, codes[name], codings[name]) for name in ("references", "predictions"))
    if task.dimensions == 3:
        reference, grid = volumes.read_label_volume(truth, None, *of_truth)
        found, _ = volumes.read_label_volume(made, grid, *of_made)
        spacing = grid.spacing
    else:
        reference, found = read_mask([truth], None, *of_truth), read_mask([made], None, *of_made)
        if found.shape != reference.shape:
            raise ValueError(other_size(made, found.shape[::-1], reference.shape[::-1]))
    if (found == IGNORED).any():
        raise ValueError(f"{made} has pixels without a class ({IGNORED}): predict a class for each.")
    return mask_rows(task, case, found, reference, spacing)
