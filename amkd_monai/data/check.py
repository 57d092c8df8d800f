"""`data check`: what a data set holds, all its problems at once, and a page of thumbnails."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from amkd_monai.data.datalist import find_items, stand_in_note
from amkd_monai.data.datasets import Named, Task, get_task
from amkd_monai.data.splits import DEFAULT_SPLIT, NEAR, Item, SplitOptions, clusters, identical, near_duplicates, spread
from amkd_monai.files import cases, names, volumes
from amkd_monai.files.masks import IGNORED, MaskCodes, coding_problem, read_mask
from amkd_monai.files.names import files_of, label_files, natural, some
from amkd_monai.files.pictures import class_colours, contrasting, level_problem, opened, outlined, read_channels
from amkd_monai.terminal import progress


@dataclass
class DataReport:
    """The result of a check: facts to read, and problems, one sentence each, to put right before a training.

    ``items`` is empty if the layout is wrong; ``damaged`` are the ids of items whose files cannot be used,
    ``held`` the classes in each usable item by its id.
    """

    task: Task
    root: Path
    items: list[Item] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    held: dict[str, set[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return everything as text."""
        lines = [f"{self.task.name} in {self.root}", *(f"  {fact}" for fact in self.facts)]
        lines.append(f"{len(self.problems)} problem(s):" if self.problems else "no problems")
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


def check_data(
    task: Named,
    root: str | Path,
    cache_dir: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    split: SplitOptions = DEFAULT_SPLIT,
    mask_codes: MaskCodes | None = None,
) -> DataReport:
    """Read every file of a data set, list its items, look for duplicates and split it.

    What is wrong with the data is in the report and raises nothing; an unknown task is a ValueError. ``cache_dir``
    keeps hashes between checks and trainings, ``options`` are those of the data set's ``find_items``; ``mask_codes``
    replaces the task's rule for the values of masks.
    """
    report = DataReport(get_task(task), Path(root))
    try:
        if note := stand_in_note(report.root):
            report.facts.append(f"STAND-IN: {note}")
        items = find_items(task, report.root, cache_dir, options)
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return report
    classes = range(len(report.task.classes))
    for item in filter(_has_class, items):
        label, several = item["label"], report.task.has_findings
        report.held[item["id"]] = {n for n in classes if label >> n & 1} if several else {label}
    report.items = sorted(items, key=lambda item: natural(item["id"]))
    flat, codes = report.task.dimensions == 2, report.task.mask_codes if mask_codes is None else mask_codes
    sizes, modes, shares, codings = [], [], {}, set[str]()
    for item in progress(report.items, desc="check files", delay=1):
        try:
            image, mask, mode = _read(item, report.task, codes, codings)
        except (ValueError, OSError) as error:
            report.damaged.add(item["id"])
            report.problems.append(str(error))
            continue
        sizes.append(image.shape[1::-1] if flat else image.shape)
        modes.append(mode)
        if mask is not None:
            shares[item["id"]] = float(((mask > 0) & (mask != IGNORED)).mean())
            report.held[item["id"]] = set(np.unique(mask).tolist())
    report.problems += filter(None, [coding_problem(codings)])
    _describe_others(report)
    report.facts.append(f"{len(report.items)} items in {len({item['group'] for item in report.items})} groups")
    if sizes:
        sizes.sort(key=lambda size: (np.prod(size), size))
        least, median, most = ("x".join(map(str, sizes[i])) for i in (0, len(sizes) // 2, -1))
        number = len(set(sizes))
        report.facts.append(f"sizes: smallest {least}, median {median}, largest {most}, {number} different")
        report.facts.append(f"{'modes' if flat else 'orders of the axes'}: {_counts(modes)}")
    _describe_classes(report)
    if shares:
        _describe_masks(report, shares)
    _describe_split(report, _duplicates(report, cache_dir), split)
    return report


def _read(
    item: Item, task: Task, codes: MaskCodes, codings: set[str] | None = None
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Picture (H, W, 3) or volume (X, Y, Z), the classes of its mask, and its mode or the order of its axes."""
    files, images, classes, mask = label_files(item), files_of(item["image"]), len(task.classes), None
    if problem := item.get("problem"):
        raise ValueError(problem)
    if task.dimensions == 2:
        with opened(images[0]) as picture:
            mode = picture.mode
        image = read_channels(images, codings)
        image = image if len(images) == 1 else np.repeat(image[..., :1], 3, -1)
        return image, read_mask(files, images[0], classes, codes, codings) if files else None, mode
    channels, grid = cases.read_case(images)
    scaled = [volumes.grey_levels(channel) for channel in channels]
    try:
        if task.values == "ct":
            low, high = volumes.ct_range(channels[0], -1250.0, 250.0)
            scaled[0] = (channels[0] - low) / (high - low)
        if problem := next(filter(None, map(level_problem, scaled)), ""):
            raise ValueError(f"it or a channel cannot be used: {problem}")
    except ValueError as error:
        raise ValueError(f"{images[0]}: {error}") from error
    if files:
        mask, _ = volumes.read_label_volume(files[0], grid, classes, codes, codings)
    return channels[0], mask, grid.axes


def _describe_others(report: DataReport) -> None:
    """Count the files that no item names, and read them; name dead links."""
    known = {str(f) for item in report.items for f in (*files_of(item["image"]), *label_files(item))}
    slices = () if report.task.dimensions == 2 else (names.DICOM_SUFFIX,)
    kinds = [suffix for suffix in names.SUFFIXES if suffix not in slices]
    found = (file for file in sorted(report.root.rglob("*")) if names.has_suffix(file, kinds))
    visible = [file for file in found if not any(p.startswith(".") for p in file.relative_to(report.root).parts)]
    others = [file for file in visible if file.is_file() and str(file) not in known]
    dead = [names.file_id(file) for file in visible if file.is_symlink() and not file.is_file()]
    total, damaged = len(known) + len(others), len(report.damaged)
    report.facts.append(f"{total} image files, {len(others)} not in the list; {damaged} damaged item(s)")
    if dead:
        report.problems.append(f"{len(dead)} dead link(s): {some(dead)}; remove them or mend their targets.")
    for file in progress(others, desc="check other files", delay=1):
        try:
            if names.has_suffix(file, names.VOLUME_SUFFIXES):
                cases.read_case([file])
            else:
                with opened(file) as image:
                    image.load()
        except (ValueError, OSError) as error:
            report.problems.append(str(error))


def _describe_classes(report: DataReport) -> None:
    classes = report.task.classes
    if counts := _counts(_class_of(item, report.task) for item in report.items):
        report.facts.append(f"classes: {counts}")
    if report.task.has_findings:
        labels = [item["label"] for item in report.items if _has_class(item)]
        for n, name in enumerate(classes):
            if len({label >> n & 1 for label in labels}) == 1:
                report.problems.append(f"{'Every' if labels[0] >> n & 1 else 'No'} image has the finding {name}.")
    elif found := {item["label"] for item in report.items if _has_class(item)}:
        missing = [name for n, name in enumerate(classes) if n not in found]
        report.problems += [f"No image of the class(es) {', '.join(missing)}."] if missing else []


def _describe_masks(report: DataReport, shares: Mapping[str, float]) -> None:
    filled = sorted((share, name) for name, share in shares.items() if share)
    several, empty = sum(len(label_files(item)) > 1 for item in report.items), len(shares) - len(filled)
    report.facts.append(f"masks: {len(shares)}, of which {empty} empty; {several} images with several")
    if not filled:
        report.problems.append("All masks are empty: check that they are the masks of this data set.")
        return
    low, middle, high = np.percentile([share for share, _ in filled], (0, 50, 100))
    report.facts.append(f"foreground if not empty: {low:.2%} to {high:.2%} of the image, median {middle:.2%}")
    for what, chosen in (("least", filled[:3]), ("most", filled[:-4:-1])):
        report.facts.append(f"{what} foreground: {', '.join(f'{name} {share:.2%}' for share, name in chosen)}")


def _duplicates(report: DataReport, cache_dir: str | Path | None) -> list[list[Item]]:
    """Report copies and near-copies; return the clusters."""
    items, kind = [item for item in report.items if "problem" not in item], "byte-identical"
    pairs = identical(items)
    for a, b in ((items[i], items[j]) for i, j in pairs):
        if _has_class(a) and a["label"] != b["label"]:
            labels = " and ".join(_class_of(item, report.task) for item in (a, b))
            of_both = f"{a['id']} and {b['id']} are one image with the labels {labels}"
            report.problems.append(f"{of_both}: drop both, or decide which is right.")
    if report.task.dimensions == 2:
        kind = "byte-identical or nearly so"
        pairs += near_duplicates(items, NEAR, cache_dir)
    found = [[items[i] for i in members] for members in clusters(len(items), pairs) if len(members) > 1]
    listed = "; ".join(" = ".join(item["id"] for item in members) for members in found)
    report.facts.append(f"duplicates ({kind}): {len(found)} clusters" + (f": {listed}" if found else ""))
    return found


def _describe_split(report: DataReport, found: list[list[Item]], how: SplitOptions) -> None:
    try:
        split = report.task.layout.split(report.root, report.items, how)
    except (OSError, ValueError) as error:
        report.problems.append(f"The data cannot be split: {error}")
        return
    place: dict[str, str] = {}
    for name, section in zip(("train", "validation", "test"), split, strict=True):
        place.update({item["id"]: name for item in section})
        counts = _counts(_class_of(item, report.task) for item in section)
        held = set[int]().union(*(report.held.get(item["id"], set()) for item in section))
        missing = [label for n, label in enumerate(report.task.classes) if n not in held]
        if missing and (held or report.task.has_findings):
            without = f"The {name} section has no {', '.join(missing)}"
            report.problems.append(f"{without}: give more images, or another split (fold, split_seed).")
        report.facts.append(f"{name}: {len(section)}" + (f" ({counts})" if counts else ""))
    if left := [item["id"] for item in report.items if item["id"] not in place]:
        report.facts.append(f"in no section: {some(left)}")
    for members in found:
        where = {place[item["id"]] for item in members if item["id"] in place}
        if len(where) > 1:
            alike, sections = ", ".join(item["id"] for item in members), ", ".join(sorted(where))
            report.problems.append(
                f"{alike} look alike and lie in several sections ({sections}): scores would be flattered; leave copies "
                "out, or use the data option duplicate_distance."
            )


def _has_class(item: Item) -> bool:
    return isinstance(item.get("label"), int)


def _class_of(item: Item, task: Task) -> str:
    """Name of an item's class; empty where its label is a mask."""
    label = item.get("class", item.get("label") if _has_class(item) else "")
    if task.has_findings and isinstance(label, int):
        return task.text_of(label)
    return task.classes[label] if isinstance(label, int) and 0 <= label < len(task.classes) else str(label)


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common() if name)


def write_contact_sheet(
    path: str | Path, task: Task, items: Sequence[Item], count: int = 30, mask_codes: MaskCodes | None = None
) -> Path:
    """Draw at most ``count`` evenly spaced items with the outlines of their masks, to see whether labels fit images.

    Of several foreground classes each has its colour, with a legend; of a volume, the slice with most foreground shows.
    No item is a ValueError.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not items:
        raise ValueError("There is no image to draw: correct the data first.")
    codes, several = task.mask_codes if mask_codes is None else mask_codes, len(task.classes) > 2
    chosen = spread(items, count)
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure((2 * columns, 2.4 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes in figure.axes:
        axes.axis("off")
    for axes, item in zip(places, chosen, strict=False):
        image, mask, _ = _read(item, task, codes)
        mask = None if mask is None else np.where(mask == IGNORED, 0, mask)
        if task.dimensions == 3 and mask is not None:  # volumes without a mask are no items
            grid, _ = cases.case_grid(files_of(item["image"]))
            image, mask = volumes.seen_slice(volumes.grey_levels(image), mask, grid)
        picture, words = Image.fromarray(image).convert("RGB"), [_class_of(item, task)]
        picture.thumbnail((400, 400))
        shown = np.asarray(picture)
        if mask is not None:
            words.append(f"{(mask > 0).mean():.1%}" if mask.any() else "empty mask")
            outline = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
            labels = np.unique(outline[outline > 0])
            colours = class_colours(labels) if several else contrasting(shown)[: len(labels)]
            shown = outlined(shown, [(outline == n, colour) for n, colour in zip(labels, colours, strict=True)])
        axes.imshow(shown, interpolation="nearest")
        axes.set_title(f"{item['id'][:28]}\n{', '.join(filter(None, words))}", fontsize=7, parse_math=False)
    if several and not task.is_classification:
        colours = class_colours(range(1, len(task.classes))) / 255
        key = [Line2D([], [], color=c, label=name) for c, name in zip(colours, task.classes[1:], strict=True)]
        figure.legend(handles=key, loc="outside lower center", ncols=4, fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=104)
    return Path(path)
