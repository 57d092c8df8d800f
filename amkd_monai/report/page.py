"""Put the page together."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

import amkd_monai
from amkd_monai.atomic import atomic_write_bytes
from amkd_monai.report import figures, sections
from amkd_monai.report.feature_map import feature_maps
from amkd_monai.report.run_folder import RunFolder, read_run


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write one self-contained HTML page about runs; the first is the reference of all comparisons.

    Args:
        folders: output folders of runs of one task.
        output: file to write.

    Returns:
        The file.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: the runs have different tasks, or a file is damaged.
        OSError: the page cannot be written.
    """
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    tasks = {run.task.name for run in runs}
    if len(tasks) != 1:
        raise ValueError(f"The runs have different tasks ({', '.join(sorted(tasks))}): make one report for each.")
    comparison, why = sections.comparison(runs)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    )
    text = page.render(
        title=f"{runs[0].task.name}: {', '.join(run.name for run in runs)}",
        version=amkd_monai.__version__,
        runs=[_describe(run) for run in runs],
        comparison=comparison,
        why=why,
        spread=_spread(runs),
        trust=sections.trust(runs),
    )
    atomic_write_bytes(Path(output), text.encode())
    return Path(output)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    if all(p[-1] == "eval" for p in parts):  # a bundle's own folder of results
        parts = [p[:-1] for p in parts]
    for count in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i + 1})" for i, name in enumerate(names)]


def _describe(run: RunFolder) -> dict[str, Any]:
    columns = [c for c in run.cases[0] if c != "label"] if run.cases else []
    ranked = sorted(run.cases, key=lambda case: sections.badness(run, case))
    teacher_columns, teacher_rows = sections.teacher_rows(run)
    maps, undrawn = feature_maps(run)
    return {
        "name": run.name,
        "heading": sections.heading(run),
        "missing": run.missing,
        "scores": sections.scores(run),
        "curves": sections.training_figures(run),
        "class_figures": sections.class_figures(run),
        "feature_maps": maps,
        "undrawn": undrawn,
        "teacher_columns": teacher_columns,
        "teacher_rows": teacher_rows,
        "shown": sections.chosen_cases(run),
        "masks": not run.task.is_classification,
        "columns": columns,
        "cases": [[_cell(c, case[c]) for c in columns] for case in ranked],
    }


def _cell(column: str, value: Any) -> str:
    if column.endswith("_volume"):
        return f"{value:.0f}"
    return sections.number(value) if isinstance(value, float) else str(value)


def _spread(runs: Sequence[RunFolder]) -> tuple[str, str] | None:
    if runs[0].task.is_classification or not any(run.cases for run in runs):
        return None
    values = {run.name: [float(case["dice"]) for case in run.cases] for run in runs if run.cases}
    return "Dice", figures.scatter(values, "Dice")
