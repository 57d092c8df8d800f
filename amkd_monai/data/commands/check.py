"""What a data set holds and what is wrong with it, all at once: `python -m amkd_monai data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.content import content_hashes
from amkd_monai.data.datalist import find_items, stand_in_note
from amkd_monai.data.duplicates import NEAR, clusters, near_duplicates
from amkd_monai.data.splits import Item, SplitOptions
from amkd_monai.files.masks import IGNORED, MaskCodes, coding_problem, read_mask
from amkd_monai.files.names import (
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    file_id,
    has_suffix,
    label_files,
    natural,
    some,
)
from amkd_monai.files.pictures import level_problem, opened, read_picture
from amkd_monai.files.volumes import ct_extremes, ct_range, grey_levels, read_label_volume, read_volume
from amkd_monai.tasks import Task, get_task
from amkd_monai.terminal import progress


@dataclass
class Finding:
    """What the files of one item are.

    Attributes:
        size: (W, H) of a picture, all axes of a volume; empty if it cannot be read.
        mode: of a picture (L, RGB, ...), or the order of the axes of a volume (RAS, LPS, ...).
        share: of the foreground; None without a mask.
        problem: one sentence, empty if there is none.
    """

    size: tuple[int, ...] = ()
    mode: str = ""
    share: float | None = None
    problem: str = ""


def inspect_item(item: Item, task: Task, codes: MaskCodes, used: set[str]) -> Finding:
    """Read the files of an item as training does; ``used`` gets the coding of its masks."""
    found, files, classes = Finding(), label_files(item), len(task.classes)
    try:
        if problem := item.get("problem"):
            raise ValueError(problem)
        if task.dimensions == 2:
            with opened(item["image"]) as image:
                found.mode = image.mode
            pixels = read_picture(item["image"])
            found.size = pixels.shape[1], pixels.shape[0]
            mask = read_mask(files, item["image"], classes, codes, used) if files else None
        else:
            volume, grid = read_volume(item["image"])
            found.size, found.mode = grid.shape, grid.axes
            if problem := _value_problem(volume, task):
                raise ValueError(f"{item['image']} cannot be used: {problem}.")
            mask = read_label_volume(files[0], grid, classes, codes, used)[0] if files else None
        if mask is not None:
            found.share = float(((mask > 0) & (mask != IGNORED)).mean())
    except (ValueError, OSError, MemoryError) as error:
        found.problem = str(error) if str(item["image"]) in str(error) or files else f"{item['image']}: {error}"
    return found


def _value_problem(volume: np.ndarray, task: Task) -> str:
    """Say what is wrong with the values of a volume after the task's scaling; empty if nothing is."""
    if task.values != "ct":
        return level_problem(grey_levels(volume))
    try:
        low, high = ct_range(*ct_extremes(volume), -1250.0, 250.0)
    except ValueError as error:
        return str(error)
    return level_problem((volume - low) / (high - low))


@dataclass
class DataReport:
    """The result of a check.

    Attributes:
        task: what the data are for.
        root: the folder.
        items: the samples; empty if the layout is wrong.
        facts: lines to read.
        problems: one sentence each; what must be put right, or known, before a training.
        damaged: ids of items whose files cannot be read or used.
    """

    task: Task
    root: Path
    items: list[Item] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    def is_damaged(self, item: Item) -> bool:
        """Whether a file of the item cannot be used."""
        return item["id"] in self.damaged

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
    mask_codes: MaskCodes | None = None,
) -> DataReport:
    """Read every file of a data set, list its items, look for duplicates and split it.

    Args:
        task: a key of ``amkd_monai.tasks.TASKS``.
        root: the data set's folder.
        cache_dir: keeps hashes between checks and trainings.
        options: further options of the data set's ``find_items``.
        fold: of the split.
        seed: of the split.
        mask_codes: what the values of masks mean; None takes the task's rule.

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
    try:
        items = find_items(task, report.root, cache_dir, options)
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return report
    report.items = sorted(items, key=lambda item: natural(item["id"]))
    used: set[str] = set()
    codes = report.task.mask_codes if mask_codes is None else mask_codes
    findings = [
        inspect_item(item, report.task, codes, used) for item in progress(report.items, desc="check files", delay=1)
    ]
    report.damaged = {i["id"] for i, finding in zip(report.items, findings, strict=True) if finding.problem}
    report.problems += [finding.problem for finding in findings if finding.problem]
    if problem := coding_problem(used):
        report.problems.append(problem)
    _describe_others(report)
    _describe_files(report, findings)
    _describe_labels(report, findings)
    found = _duplicates(report, cache_dir)
    _describe_split(report, found, fold, seed)
    return report


def _describe_others(report: DataReport) -> None:
    """Count the files that no item names, and read them; name dead links."""
    known = {str(f) for item in report.items for f in (item["image"], *label_files(item))}
    others, dead = [], []
    for file in sorted(report.root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(report.root).parts)
        if hidden or not has_suffix(file.name, (*PICTURE_SUFFIXES, *VOLUME_SUFFIXES)) or str(file) in known:
            continue
        if file.is_file():
            others.append(file)
        elif file.is_symlink():
            dead.append(file_id(file))
    report.facts.append(
        f"{len(known) + len(others)} image files, {len(others)} of no item; {len(report.damaged)} damaged item(s)"
    )
    if dead:
        report.problems.append(f"{len(dead)} dead link(s): {some(dead)}; remove them or mend their targets.")
    for file in progress(others, desc="check other files", delay=1):
        try:
            if has_suffix(file.name, VOLUME_SUFFIXES):
                read_volume(file)
            else:
                with opened(file) as image:
                    image.load()
        except (ValueError, OSError, MemoryError) as error:
            report.problems.append(str(error) if str(file) in str(error) else f"{file}: {error}")


def _describe_files(report: DataReport, findings: Sequence[Finding]) -> None:
    known = [finding for finding in findings if finding.size]
    report.facts.append(f"{len(report.items)} items in {len({item['group'] for item in report.items})} groups")
    if known:
        sizes = sorted((finding.size for finding in known), key=lambda size: (np.prod(size), size))
        words = ["x".join(map(str, size)) for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
        report.facts.append(
            f"sizes: smallest {words[0]}, median {words[1]}, largest {words[2]}, {len(set(sizes))} different"
        )
        what = "modes" if report.task.dimensions == 2 else "orders of the axes"
        report.facts.append(f"{what}: {_counts(finding.mode for finding in known)}")


def _describe_labels(report: DataReport, findings: Sequence[Finding]) -> None:
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
    shares = {i["id"]: f.share for i, f in zip(items, findings, strict=True) if f.share is not None and not f.problem}
    if not shares:
        return
    filled = sorted((share, name) for name, share in shares.items() if share)
    several = sum(len(label_files(item)) > 1 for item in items)
    report.facts.append(
        f"masks: {len(shares)}, of which {len(shares) - len(filled)} empty; {several} images with several"
    )
    if filled:
        low, middle, high = np.percentile([share for share, _ in filled], (0, 50, 100))
        report.facts.append(f"foreground where there is any: {low:.2%} to {high:.2%} of the image, median {middle:.2%}")
        for what, chosen in (("least", filled[:3]), ("most", filled[:-4:-1])):
            report.facts.append(f"{what} foreground: {', '.join(f'{name} {share:.2%}' for share, name in chosen)}")
    else:
        report.problems.append("All masks are empty: check that they are the masks of this data set.")


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
        sections = report.task.layout.split(report.root, report.items, SplitOptions(fold=fold, seed=seed))
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
