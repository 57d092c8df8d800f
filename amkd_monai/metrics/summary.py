"""Turns the rows of all cases into reported numbers and a table; reads and writes the files of an evaluation."""

import csv
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.datasets import Task
from amkd_monai.files.names import file_of
from amkd_monai.metrics import classification
from amkd_monai.metrics.classification import class_metrics, labels_and_probabilities
from amkd_monai.metrics.segmentation import METRICS
from amkd_monai.metrics.statistics import bootstrap_ci, interval, resampled
from amkd_monai.storage import atomic_write_bytes, atomic_write_json, jsonable, now, read_json
from amkd_monai.terminal import align, number

CASES, SEEN_CASES, FIGURES = "per_case.csv", "per_case_seen.csv", "metrics.json"
TEXT_COLUMNS = ("id", "group", "class", "status")
"""Columns of a case file that hold text; every other column holds numbers."""

PREVIEWS = "previews"  # folder of the small copies of the cases of a run
TEACHERS = "teachers.npz"  # file with the teacher outputs of a run for a few training images

Row = dict[str, Any]


def preview_file(output_dir: str | Path, case: str) -> Path:
    """File of the preview of a case; of ids that differ in signs alone each has its own."""
    plain = re.sub(r"[^\w.()-]+", "_", case)
    mark = "" if plain == case else f"-{hashlib.sha256(case.encode()).hexdigest()[:8]}"
    return file_of(Path(output_dir) / PREVIEWS, f"{plain}{mark}.npz")


def summarise(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """Aggregate case rows: a mean over cases with its 95 % bootstrap interval, never pooled over pixels.

    The case is the unit: with several foreground classes a case first gets the mean of its classes (NaN left out);
    regions and background enter no such mean. Cases that have no value are left out of a metric and counted under
    ``status``. ``rows`` are those of :py:func:`~amkd_monai.metrics.segmentation.mask_rows`; two of one case and class
    are a ValueError.

    Returns:
        ``cases`` (number of ids), ``status`` (rows per status), ``empty_references`` (rows on which no metric is
        defined), ``false_positive_rate`` (share of them where something was predicted, NaN if there are none),
        ``metrics`` (for each metric ``mean``, ``ci_low``, ``ci_high``, ``median``, ``n``); with several classes
        ``classes``, the same for each of them, and ``with_background``, the metrics that background has, where its
        rows count as a class; with regions ``regions``, the same as ``classes`` for each of them.
    """
    seen = Counter((row["id"], row["class"]) for row in rows)
    if twice := [key for key, count in seen.items() if count > 1]:
        raise ValueError(f"Case {twice[0][0]!r} has two rows for the class {twice[0][1]!r}.")
    parts: dict[str, dict[str, list[Row]]] = {"classes": {}, "regions": {}, "background": {}}
    for row in rows:
        parts[part_of(row)].setdefault(row["class"], []).append(row)
    classes = [row for row in rows if part_of(row) == "classes"]
    summary = _summarise_rows(classes, metrics)
    for part in ("classes", "regions"):
        if len(parts[part]) > (part == "classes"):
            summary[part] = {name: _summarise_rows(its_rows, metrics) for name, its_rows in parts[part].items()}
    if background := [row for its_rows in parts["background"].values() for row in its_rows]:
        defined = [metric for metric in metrics if not all(math.isnan(row[metric]) for row in background)]
        summary["with_background"] = {m: _summarise_metric([*classes, *background], m) for m in defined}
    return summary


def part_of(row: Row) -> str:
    """Whether a row of a case is one of ``classes``, of ``regions`` or of ``background``."""
    label = row.get("label", 1)
    return "regions" if math.isnan(label) else "classes" if label else "background"


def _summarise_rows(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    status = Counter(row["status"] for row in rows)
    empty = status["false_positive"] + status["empty_both"]
    return {
        "cases": len({row["id"] for row in rows}),
        "status": dict(sorted(status.items())),
        "empty_references": empty,
        "false_positive_rate": status["false_positive"] / empty if empty else math.nan,
        "metrics": {metric: _summarise_metric(rows, metric) for metric in metrics},
    }


def _summarise_metric(rows: Sequence[Row], metric: str) -> dict[str, float]:
    by_case: dict[Any, list[float]] = {}
    for row in rows:
        if not math.isnan(row[metric]):
            by_case.setdefault(row["id"], []).append(row[metric])
    values = [math.fsum(of_case) / len(of_case) for of_case in by_case.values()]
    mean, low, high = bootstrap_ci(values)
    median = float(np.median(values)) if values else math.nan
    return {"mean": mean, "ci_low": low, "ci_high": high, "median": median, "n": len(values)}


def summarise_classes(rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """Aggregate rows of a classification: every metric with its 95 % bootstrap interval over cases.

    Returns:
        ``cases``, ``classes`` (cases per class), ``metrics`` ({name: ``value``, ``ci_low``, ``ci_high``}),
        ``confusion`` (true classes by row; none of findings) and ``reliability`` (a row per bin of the largest
        probability). Resamples that lack a class are left out where a metric needs it.
    """
    label, p = labels_and_probabilities(task, rows)
    samples = [(label[i], p[i]) for i in resampled(len(label))]
    table = {}
    for name, metric in class_metrics(task).items():
        low, high = interval(np.array([metric(y, q) for y, q in samples]))
        table[name] = {"value": metric(label, p), "ci_low": low, "ci_high": high}
    counts = [(label >> c & 1 if task.has_findings else label == c).sum() for c in range(len(task.classes))]
    found = {"cases": len(rows), "classes": dict(zip(task.classes, map(int, counts), strict=True)), "metrics": table}
    if not task.has_findings:
        found["confusion"] = classification.confusion_matrix(label, p.argmax(1), len(task.classes)).tolist()
    return found | {"reliability": classification.reliability_table(*classification.choices(task, label, p))}


def format_table(summary: Mapping[str, Any], title: str) -> str:
    """Either summary as a plain-text table, a line per metric (of masks also per class and region, if there are)."""
    masks = "status" in summary
    value, counts, more = ("mean", "status", ("median", "n")) if masks else ("value", "classes", ())
    lines: list[Sequence[str]] = [("", value, "95 % CI", *more)]
    for name, block in [("", summary["metrics"]), *class_summaries(summary)]:
        for metric, v in block.items():
            bounds = f"[{number(v['ci_low'])}, {number(v['ci_high'])}]"
            others = (number(v["median"]), str(v["n"])) if masks else ()
            lines.append((f"{name} {metric}".strip(), number(v[value]), bounds, *others))
    counted = ", ".join(f"{name} {count}" for name, count in summary[counts].items())
    table = [f"{title} ({summary['cases']} cases; {counted})", align(lines)]
    if empty := summary.get("empty_references"):
        wrong = summary["status"].get("false_positive", 0)
        table.append(f"empty references, in no mean above: {empty}, of which {wrong} with a false positive")
    return "\n".join(table)


def class_summaries(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and metrics of each class and region of masks, and of the mean with background, where there are several."""
    parts = ("classes", "regions") if "status" in summary else ()
    found = [(name, of["metrics"]) for part in parts for name, of in summary.get(part, {}).items()]
    return found + [("with background", of) for of in [summary.get("with_background")] if of]


def write_case_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV (UTF-8, atomic): all digits, NaN and missing values as empty cells; no rows, a ValueError."""
    if not rows:
        raise ValueError(f"There are no cases to write to {path}.")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    atomic_write_bytes(path, text.getvalue().encode())


def read_case_csv(path: str | Path) -> list[Row]:
    """Read what :func:`write_case_csv` wrote; a damaged line is a ValueError with its number."""
    rows = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        for number, raw in enumerate(csv.DictReader(file), start=2):
            if None in raw or None in raw.values():
                raise ValueError(f"{path}, line {number} does not have as many cells as the header.")
            try:
                rows.append({key: text if key in TEXT_COLUMNS else _parse(text) for key, text in raw.items()})
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
    return rows


def _parse(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text or math.nan)


def figures_of(task: Task, rows: Sequence[Row], seen: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``metrics.json`` says of the rows of all cases: the task, ``summary``, and ``seen`` where there is.

    Cases in ``seen``, {id: where}, took part in the training; they count under ``seen`` alone. One must be left.
    """

    def summary(rows: Sequence[Row]) -> dict[str, Any]:
        return summarise_classes(rows, task) if task.is_classification else summarise(rows)

    apart, kept = ([row for row in rows if (row["id"] in seen) is which] for which in (True, False))
    if not kept:
        raise ValueError("Every case took part in the student's training: give data of another origin.")
    figures: dict[str, Any] = dict(task.identity)
    if task.is_classification:
        figures["primary_metric"] = task.primary_metric
    else:
        figures |= {"unit": task.unit, "nsd_tolerance": task.nsd_tolerance}
    if apart:
        figures["seen"] = {"cases": dict(seen), "summary": summary(apart)}
    return figures | {"summary": summary(kept)}


def write_figures(folder: Path, rows: Sequence[Row], figures: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Write the files of an evaluation and return its table; ``facts`` are further content of ``metrics.json``.

    If some cases could not be used, a folder with the figures of all cases is refused by a ValueError.
    """
    skipped, seen = facts.get("skipped_samples", ()), figures.get("seen", {"cases": {}})
    old = read_json(folder / FIGURES) if skipped else {}
    if old and old.get("student_sha256") == facts.get("student_sha256") and not old.get("skipped_samples"):
        raise ValueError(
            f"{folder / FIGURES} holds the figures of all cases and stays: {len(skipped)} case(s) could not be used "
            f"now: {skipped[0]['reason']} Restore the files, or give an --output_dir of its own."
        )
    title = figures["task"] + (f", HD95 in {figures['unit']}" if "unit" in figures else "")
    tables = [format_table(figures["summary"], title)]
    if seen["cases"]:
        apart = f"{title}: {len(seen['cases'])} case(s) of the student's training, in no figure above"
        tables.append(format_table(seen["summary"], apart))
        write_case_csv(folder / SEEN_CASES, [row for row in rows if row["id"] in seen["cases"]])
    write_case_csv(folder / CASES, [row for row in rows if row["id"] not in seen["cases"]])
    atomic_write_json(folder / FIGURES, jsonable({"written": now(), **facts, **figures}))
    return "\n".join(tables)
