"""What a data set holds and what is wrong with it, all at once: `python -m amkd_monai data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.commands.file_check import Finding, image_files, inspect_file
from amkd_monai.data.content import content_hashes
from amkd_monai.data.datalist import MODULES, find_items
from amkd_monai.data.duplicates import NEAR, clusters, near_duplicates
from amkd_monai.data.layout import DataProblems, label_files, natural, some
from amkd_monai.data.masks import read_mask
from amkd_monai.data.splits import Item, SplitOptions
from amkd_monai.data.stand_in import stand_in_note
from amkd_monai.tasks import Task, get_task
from amkd_monai.terminal import progress


@dataclass
class DataReport:
    """The result of a check.

    Attributes:
        task: what the data are for.
        root: the folder.
        items: the samples; empty if the layout is wrong.
        facts: lines to read.
        problems: one sentence each; what must be put right, or known, before a training.
        damaged: files that cannot be read or used.
    """

    task: Task
    root: Path
    items: list[Item] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    def is_damaged(self, item: Item) -> bool:
        """Whether a file of the item cannot be used."""
        return not self.damaged.isdisjoint((item["image"], *label_files(item)))

    def __str__(self) -> str:
        """Return everything as text."""
        lines = [f"{self.task.name} in {self.root}", *(f"  {fact}" for fact in self.facts)]
        if self.problems:
            lines += [f"{len(self.problems)} problem(s):", *(f"  - {problem}" for problem in self.problems)]
        else:
            lines.append("no problems")
        return "\n".join(lines)


def check_data(
    task: str,
    root: str | Path,
    cache_dir: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    fold: int = 0,
    seed: int = 0,
) -> DataReport:
    """Read every file of a data set, list its items, look for duplicates and split it.

    Args:
        task: a key of ``amkd_monai.tasks.TASKS``.
        root: the data set's folder.
        cache_dir: keeps hashes between checks and trainings.
        options: further options of the data set's ``find_items``.
        fold: of the split.
        seed: of the split.

    Returns:
        Facts and problems; what is wrong with the data raises nothing.

    Raises:
        ValueError: unknown task.
    """
    report = DataReport(get_task(task), Path(root))
    try:
        if note := stand_in_note(report.root):
            report.facts.append(f"STAND-IN: {note}")
    except ValueError as error:
        report.problems.append(str(error))
    files = progress(list(image_files(report.root)), desc="check files", delay=1)
    findings = {str(file): inspect_file(file) for file in files}
    report.damaged = {file for file, finding in findings.items() if finding.problem}
    report.problems += [finding.problem for finding in findings.values() if finding.problem]
    report.facts.append(f"{len(findings)} image files, {len(report.damaged)} of them damaged")
    try:
        items = find_items(task, report.root, cache_dir, options)
    except DataProblems as error:
        known = tuple(f"{file} " for file in report.damaged)
        report.problems += [problem for problem in error.problems if not problem.startswith(known)]
        return report
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return report
    report.items = sorted(items, key=lambda item: natural(item["id"]))
    _describe_files(report, findings)
    _describe_labels(report)
    found = _duplicates(report, cache_dir)
    _describe_split(report, found, fold, seed)
    return report


def _describe_files(report: DataReport, findings: Mapping[str, Finding]) -> None:
    known = [findings[i["image"]] for i in report.items if i["image"] in findings.keys() - report.damaged]
    report.facts.append(f"{len(report.items)} items in {len({item['group'] for item in report.items})} groups")
    if known:
        sizes = sorted((finding.size for finding in known), key=lambda size: (np.prod(size), size))
        words = ["x".join(map(str, size)) for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
        report.facts.append(
            f"sizes: smallest {words[0]}, median {words[1]}, largest {words[2]}, {len(set(sizes))} different"
        )
        report.facts.append(f"modes: {_counts(finding.mode for finding in known)}")


def _describe_labels(report: DataReport) -> None:
    items, classes = report.items, report.task.classes
    numbers = [item["label"] for item in items if isinstance(item.get("label"), int)]
    if numbers:
        report.facts.append(f"classes: {_counts(classes[n] if 0 <= n < len(classes) else str(n) for n in numbers)}")
        wrong = sorted({n for n in numbers if not 0 <= n < len(classes)})
        report.problems += [f"The label {n} is not one of the classes 0 to {len(classes) - 1}." for n in wrong]
        if missing := set(range(len(classes))) - set(numbers):
            report.problems.append(f"No image of the class(es) {', '.join(classes[n] for n in sorted(missing))}.")
    if any("class" in item for item in items):
        report.facts.append(f"classes: {_counts(item['class'] for item in items if 'class' in item)}")
    shares: list[float] = []
    for item in items:
        files = label_files(item)
        if files and report.damaged.isdisjoint(files):
            share, problem = foreground_share(files, report.task.dimensions)
            if problem:
                report.problems.append(problem)
                report.damaged.update(files)
            else:
                shares.append(share)
    if shares:
        filled = np.array([share for share in shares if share > 0])
        several = sum(len(label_files(item)) > 1 for item in items)
        report.facts.append(
            f"masks: {len(shares)}, of which {len(shares) - len(filled)} empty; {several} images with several"
        )
        if len(filled):
            low, middle, high = np.percentile(filled, (0, 50, 100))
            report.facts.append(
                f"foreground where there is any: {low:.2%} to {high:.2%} of the image, median {middle:.2%}"
            )
        else:
            report.problems.append("All masks are empty: check that they are the masks of this data set.")


def foreground_share(files: Sequence[str], dimensions: int) -> tuple[float, str]:
    """Return the share of foreground in the masks of one image, and what is wrong with them, in a sentence."""
    if dimensions == 2:
        try:
            return float(read_mask(files).mean()), ""
        except ValueError as error:
            return 0.0, str(error)
    import nibabel

    label = np.asanyarray(nibabel.load(files[0]).dataobj)
    if (label != np.round(label)).any() or label.min() < 0:
        return 0.0, f"Label {files[0]} holds values that are no class indices: replace it by an intact copy."
    return float((label > 0).mean()), ""


def _duplicates(report: DataReport, cache_dir: str | Path | None) -> list[list[int]]:
    """Report copies and near-copies; return the clusters as indices of items."""
    items = report.items
    memo = None if cache_dir is None else Path(cache_dir) / "content_hashes.json"
    contents = content_hashes([item["image"] for item in items], memo)
    first: dict[str, int] = {}
    identical = [(first.setdefault(content, i), i) for i, content in enumerate(contents)]
    pairs = [pair for pair in identical if pair[0] != pair[1]]
    near: list[tuple[int, int]] = []
    if report.task.dimensions == 2:
        near = near_duplicates([item["image"] for item in items], NEAR, cache_dir)
    found = [members for members in clusters(len(items), pairs + near) if len(members) > 1]
    kind = "byte-identical or nearly so" if report.task.dimensions == 2 else "byte-identical"
    names = [" = ".join(items[i]["id"] for i in members) for members in found]
    report.facts.append(f"duplicates ({kind}): {len(found)} clusters" + (f": {'; '.join(names)}" if names else ""))
    for first_index, second in pairs:
        a, b = items[first_index], items[second]
        if isinstance(a.get("label"), int) and a["label"] != b["label"]:
            report.problems.append(
                f"{a['id']} and {b['id']} are one image with the labels {a['label']} and {b['label']}: drop both, or "
                "decide which is right."
            )
    return found


def _describe_split(report: DataReport, found: list[list[int]], fold: int, seed: int) -> None:
    try:
        sections = MODULES[report.task.name].split(report.root, report.items, SplitOptions(fold=fold, seed=seed))
    except (OSError, ValueError) as error:
        report.problems.append(f"The data cannot be split: {error}")
        return
    names = ("train", "validation", "test")
    place = {item["id"]: name for name, section in zip(names, sections, strict=True) for item in section}
    for name, section in zip(names, sections, strict=True):
        label = [item.get("class", item["label"] if isinstance(item.get("label"), int) else None) for item in section]
        counts = _counts(
            report.task.classes[n] if isinstance(n, int) and n < len(report.task.classes) else str(n)
            for n in label
            if n is not None
        )
        report.facts.append(f"{name}: {len(section)}" + (f" ({counts})" if counts else ""))
    left = [item["id"] for item in report.items if item["id"] not in place]
    if left:
        report.facts.append(f"in no section: {some(left)}")
    for members in found:
        ids = [report.items[i]["id"] for i in members]
        where = {place[name] for name in ids if name in place}
        if len(where) > 1:
            report.problems.append(
                f"{', '.join(ids)} look alike and lie in several sections ({', '.join(sorted(where))}): scores would "
                "be flattered; leave copies out, or use the data option duplicate_distance."
            )


def _counts(values: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(values).most_common())
