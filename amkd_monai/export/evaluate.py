"""Score an exported student on labelled data by ONNX Runtime alone, without importing torch or MONAI: `evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amkd_monai.data.datalist import labelled_folder
from amkd_monai.data.datasets import Task, recorded_task
from amkd_monai.data.seen import seen_before
from amkd_monai.data.splits import Item
from amkd_monai.export.predict import SEEN, Input, Predictor, pictured
from amkd_monai.files.masks import MaskCodes, coding_problem, read_mask
from amkd_monai.files.names import DataProblems, files_of, label_files
from amkd_monai.files.volumes import read_label_volume
from amkd_monai.metrics.classification import class_row
from amkd_monai.metrics.segmentation import mask_rows
from amkd_monai.metrics.summary import FIGURES, Row, figures_of, preview_file, write_figures
from amkd_monai.report.page import write_report
from amkd_monai.report.previews import mask_preview, save_arrays, small
from amkd_monai.storage import file_sha256, read_json
from amkd_monai.terminal import logger, progress


def evaluate(
    predictor: Predictor,
    data: str | Path,
    output: Path,
    seen: str = "refuse",
    options: Mapping[str, Any] | None = None,
    codes: MaskCodes | None = None,
) -> str:
    """Score all that is labelled in a folder, write tables, pictures and report to ``output``, and return the table.

    ``seen`` is what to do with images of the training, ``refuse`` or ``apart``; ``options`` are those of the data set's
    ``find_items``, ``codes`` the meaning of the values of masks, in place of the training's. Files that cannot be used
    are DataProblems; images that the student has seen, and figures of another student or of other data in the folder,
    are a ValueError.
    """
    config, task = predictor.config, recorded_task(predictor.config)
    if config["classes"] != list(task.classes):
        own = ", ".join(config["classes"])
        raise ValueError(f"{predictor.folder} has the classes {own}, not those of {task.name}: export again.")
    codes = config["mask_codes"] if codes is None else codes
    found = labelled_folder(task, data, None, options).checked("stop")
    if not (known := read_json(predictor.folder / SEEN)):
        logger.warning("%s is empty: whether the student has seen images of %s could not be checked.", SEEN, data)
    found.seen.update(seen_before(known, found, seen))
    facts: dict[str, Any] = {"data": found.describe(), "student": str(predictor.model), "seen": found.seen}
    facts |= {"student_sha256": file_sha256(predictor.model), "seen_is_known": bool(known)}
    facts |= {"mask_codes": codes, "data_options": dict(options or {}), "run": config["run"]}
    old = read_json(output / FIGURES)
    if any(old.get(key, facts[key]) != facts[key] for key in ("student_sha256", "data")):
        raise ValueError(f"{output} holds figures of another student or of other data: give another --output.")
    rows, problems, codings = list[Row](), list[str](), set[str]()
    for item in progress(sorted(found.test, key=lambda item: str(item["id"])), desc="evaluate"):
        try:
            rows += _case(predictor, task, item, codes, codings, output)
        except (ValueError, OSError) as error:
            problems.append(f"{files_of(item['image'])[0]}: {error}")
    if problems := [*problems, *filter(None, [coding_problem(codings)])]:
        raise DataProblems(problems)
    table = write_figures(output, rows, figures_of(task, rows, found.seen), facts)
    return f"{table}\nreport: {write_report([output], output / 'report.html')}"


def _case(predictor: Predictor, task: Task, item: Item, codes: MaskCodes, codings: set[str], output: Path) -> list[Row]:
    """Answer one image, keep its pictures and score it."""
    case, files, masks = str(item["id"]), files_of(item["image"]), label_files(item)
    image = Input(case, files)
    array, grid, answer = predictor.answered(image)
    if task.is_classification:
        save_arrays(preview_file(output, case), {"image": small(pictured(image, array)[None])})
        return [class_row(task, case, int(item["label"]), answer)]
    if grid is not None:
        reference = read_label_volume(masks[0], grid, len(task.classes), codes, codings)[0]
    else:
        reference = read_mask(masks, files[0], len(task.classes), codes, codings)
    save_arrays(preview_file(output, case), mask_preview(files[0], reference, answer))
    return mask_rows(task, case, answer, reference, grid.spacing if grid else (1.0, 1.0))
