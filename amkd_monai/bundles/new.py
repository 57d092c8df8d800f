"""Writes a bundle for your own data: inspects a folder, reports its findings, builds the configs from the parts."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.bundles.merge import ABSENT, PARTS, bundle_files, resolved
from amkd_monai.data.datasets import Task, get_task
from amkd_monai.data.datasets.described import BINARY, COLUMNS, Described, names_of_channels, names_of_values
from amkd_monai.data.splits import PATIENT, Item, spread
from amkd_monai.files import masks, volumes
from amkd_monai.files.cases import case_grid, is_volume, read_case
from amkd_monai.files.names import (
    DICOM_SUFFIX,
    SUFFIXES,
    VOLUME_SUFFIXES,
    DataProblems,
    files_of,
    has_suffix,
    label_files,
    natural,
    some,
    table_rows,
)
from amkd_monai.files.pictures import picture_frame, read_picture
from amkd_monai.storage import atomic_folder
from amkd_monai.terminal import progress

LARGEST_SIDE = 256  # pixels of a side of what a student sees, at most
LOOKED_AT = 20  # images of which the values are read, evenly over the data
SLICES = {0: ("RAS", [0, 1, 2]), 1: ("AIL", [1, 2, 0]), 2: ("SPL", [2, 1, 0])}
"""Order of the axes, the slices' first, by the anatomical axis with the longest voxels; and as indices of RAS."""
WINDOW = (0.5, 99.5)  # percentiles of the Hounsfield units within the labels that a CT is scaled between


def new_bundle(
    name: str,
    data: str | Path,
    to: str | Path = "bundles",
    classes: Sequence[str] = (),
    groups: str = "",
    kind: str = "",
    modality: str = "",
) -> tuple[Path, list[str]]:
    """Write a bundle for the data in a folder, and return its folder and what was found, one fact a line.

    ``data`` has any form that :class:`~amkd_monai.data.datasets.described.Described` reads, ``to`` is the folder of
    bundles. ``classes`` are names by label value, background first where labels are masks; () takes those of the data.
    ``groups`` is what the split must never cut, such as patients: a column of the table, or a regular expression whose
    first group in an image's name it is. "" finds out ``kind`` and guesses ``modality`` (how the images were made).
    Files that cannot be used are DataProblems, which name all of them; an existing bundle is a FileExistsError; a
    folder without known form, or labels that do not fit ``classes``, a ValueError.
    """
    root, folder = Path(data).expanduser().resolve(), Path(to).expanduser() / name
    if folder.exists():
        raise FileExistsError(f"The bundle {folder} already exists: give another name, or remove it.")
    description, facts, items = _described(name, root, classes, groups, kind)
    flat, several = description["dimensions"] == 2, "channels" in description
    guessed = "several channels" if several else modality
    found, part = _pictures(items) if flat else _volumes(items, description, guessed)
    description["modality"] = modality or part["modality"]
    description["folder"] = os.path.relpath(root, folder.resolve() / "configs")
    task = get_task(description)
    facts += [*found, f"{task.kind}, classes: {', '.join(task.classes)} (other names: --classes)"]
    if several:
        facts.append(f"channels: {', '.join(task.channels)}; teachers see {', '.join(task.teacher_channels)}")
    own = _part(name, task, part)
    texts = bundle_files(name, own) | {"configs/task.json": json.dumps(description, indent=2) + "\n"}
    values = {"bundle": name, "place": (Path(to) / name).as_posix(), **own["values"]}
    for place in ("docs/README.md", "docs/data_license.txt", "LICENSE"):
        texts[place] = resolved((PARTS / Path(place).name).read_text(encoding="utf-8"), values)
    with atomic_folder(folder) as made:
        for place, text in texts.items():
            (made / place).parent.mkdir(parents=True, exist_ok=True)
            (made / place).write_text(text, encoding="utf-8")
    return folder, facts


def _described(
    name: str, root: Path, classes: Sequence[str], groups: str, kind: str
) -> tuple[dict[str, Any], list[str], list[Item]]:
    """The description of the task, facts, and the items that can be used, with the first file of each image."""
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}: correct --data.")
    layout, said = _layout(root, classes, kind)
    if groups and layout.form == "table" and any(groups in table_rows(file)[0] for file in _tables(layout, root)):
        layout = replace(layout, columns={**layout.columns, "group": groups})
    elif groups:
        layout = replace(layout, groups=groups)
    rows = layout.rows(root)
    labels = [row["label"] for row in rows if "problem" not in row]
    if not labels:
        nothing = f"There are no labelled images in {root}: expected {Described.expected}."
        raise DataProblems([row["problem"] for row in rows] or [nothing])
    if not kind and not layout.masks and any(has_suffix(f, SUFFIXES) for label in labels for f in files_of(label)):
        layout = replace(layout, kind="segmentation")
        rows = layout.rows(root)
    elif not kind and layout.form != "classes" and any("|" in str(label) for label in labels):
        layout = replace(layout, kind="multilabel")
    sizes = Counter(size for row in rows if (size := _size(files_of(row["image"]))))
    volume, count = sizes.most_common(1)[0][0] if sizes else (is_volume(files_of(rows[0]["image"])[0]), 1)
    if volume and not layout.masks:
        raise ValueError(f"{root} holds volumes with classes: give their masks, as in images/ and masks/ or nnU-Net's.")
    description: dict[str, Any] = {"name": name, "kind": layout.kind, "dimensions": 3 if volume else 2}
    description["layout"] = {key: value for key in ("form", "columns", "groups") if (value := getattr(layout, key))}
    if count > 1:
        named = names_of_channels(root)
        description["channels"] = named if len(named) == count else [f"channel {number}" for number in range(count)]
        description["teacher_channels"] = description["channels"][: 3 if count > 2 and not volume else 1]
    if not layout.masks:
        own, facts = _image_classes(list(map(str, labels)), list(layout.classes or classes), layout.kind)
        description, said = description | own, facts + said
    layout = replace(layout, title=name, volumes=volume, channels=count, classes=description.get("classes", ()))
    found = layout.items_of(rows, root)
    items = [{**item, "image": files_of(item["image"])[0]} for item in found if "problem" not in item]
    if not items:
        raise DataProblems([item["problem"] for item in found])
    if layout.masks:
        own, said = _mask_classes(items, list(classes), *names_of_values(root))
    all_groups = {item["group"] for item in found}
    of_groups = f"groups: {len(all_groups)}"
    if not groups and not any(row.get("group") for row in rows):
        by_patient = any(group.startswith(PATIENT) for group in all_groups)
        alone = f"EACH IMAGE IS A GROUP OF ITS OWN ({len(all_groups)}): if several are of one patient, give --groups"
        of_groups = f"{of_groups}, with DICOM images of one patient together" if by_patient else alone
    facts = [f"{len(found)} labelled {'volumes' if volume else 'pictures'} ({layout.form})", *said, of_groups]
    if lost := len(found) - len(items):
        facts.append(f"{lost} of them cannot be used: the command `data check` names them")
    return description | own, facts, items


def _size(files: Sequence[str]) -> tuple[bool, int] | None:
    """Whether an image is a volume, and the number of its channels; None if that cannot be read."""
    try:
        channels = case_grid(files)[1] if is_volume(files[0]) else len(files)
    except (OSError, ValueError):
        return None
    return (is_volume(files[0]), channels) if all(Path(file).exists() for file in files) else None


def _tables(layout: Described, root: Path) -> list[Path]:
    """The tables of a folder that name images."""
    return [table for table in sorted(root.glob("[!.]*.[ct]sv")) if "image" in layout.columns_of(table)]


def _layout(root: Path, classes: Sequence[str], kind: str) -> tuple[Described, list[str]]:
    """The layout of a folder, with labels of images as they are written, and a fact about its table of findings."""
    layouts = [Described(kind=k, title="labelled") for k in ([kind] if kind else ["segmentation", "classification"])]
    layout = next((replace(one, form=form) for one in layouts if (form := one.form_of(root))), layouts[0])
    if not kind and layout.form in ("datalist", "table"):
        layout = replace(layout, kind="classification")
    tables = _tables(layout, root) if not layout.form or kind == "multilabel" else []
    if layout.form == "classes" and not kind and (tables := _tables(layout, root)):
        several = len({row["label"] for row in layout.rows(root)}) > 1
        findings = len(_binary_columns(tables[0], (), layout, odd_is_error=not several)[0]) > 1
        if several and findings:
            what = f"{root} holds folders of classes and {tables[0].name}, a table of findings"
            raise ValueError(f"{what}: say by --kind classification or --kind multilabel which of them counts.")
        layout, tables = (replace(layout, form=""), tables) if findings else (layout, [])
    if not tables or (layout.form and "label" in layout.columns_of(tables[0])):
        layout.check(root)
        return layout, []
    columns, others = _binary_columns(tables[0], classes, layout)
    if len(columns) < 2 or kind not in ("", "multilabel"):
        found, usual = ", ".join(table_rows(tables[0])[0]), ", ".join(COLUMNS["label"])
        none = f"none of them for labels ({usual}) and not several with 0 or 1 of a finding in each row"
        raise ValueError(f"{tables[0]} has the columns {found}, {none}: name or correct them.")
    said = [f"columns that are no findings: {', '.join(others) or 'none'}"]
    return Described(kind="multilabel", form="table", classes=columns, columns={"label": columns}), said


def _binary_columns(
    table: Path, chosen: Sequence[str], layout: Described, odd_is_error: bool = True
) -> tuple[list[str], list[str]]:
    """The columns of a table whose cells are 0 or 1, all or those chosen, and the others.

    A column chosen, or filled mostly with 0 and 1, that holds something else is a ValueError if that is an error.
    """
    header, rows = table_rows(table)
    rows, named = [row for row in rows if any(row.values())], layout.columns_of(table)
    cells = {name: [row[name] for row in rows] for name in header if name not in named.values()}
    for name in chosen or cells:
        of = cells.get(name, ["no such column"])
        odd = [cell for cell in of if cell not in BINARY]
        if odd_is_error and odd and (chosen or 2 * (len(of) - len(odd)) > sum(map(bool, of))):
            what = f"{table} needs 0 or 1 in each cell of the column {name} and has '{odd[0]}'"
            raise ValueError(f"{what}: correct it, or name the columns of findings by --classes.")
    found = list(chosen) or [name for name, of in cells.items() if of and all(cell in BINARY for cell in of)]
    return found, [name for name in header if name not in found]


def _image_classes(labels: Sequence[str], names: list[str], kind: str) -> tuple[dict[str, Any], list[str]]:
    """Classes of images, or findings of labels such as "a|b", with facts that count them; others are a ValueError."""
    several = kind == "multilabel"
    parts = (part.strip() for label in labels for part in (label.split("|") if several else [label]))
    named = {part.removesuffix(".0") for part in parts} - {""}
    for name in () if several or names else sorted(named):
        if re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", name.lower()):
            raise ValueError(f"The label {name} is a measurement: write classes, or name them by --classes.")
        if len(of := {part.strip() for part in re.split("[;,/+]", name)}) > 1 and of <= named:
            raise ValueError(f"The label '{name}' joins others: join findings by |, or give --classes.")
    names = names or sorted((n for n in named if Described(kind=kind).label_of(n) != 0), key=natural)
    found = [Described(kind=kind, classes=names).label_of(label) for label in labels]
    if lost := {label for label, number in zip(labels, found, strict=True) if number is None}:
        raise ValueError(f"The labels {some(lost)} are not among --classes {','.join(names)}: name all of them.")
    numbers = [number or 0 for number in found]
    counts = [sum(n >> place & 1 if several else n == place for n in numbers) for place in range(len(names))]
    shown = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    if several:
        return {"classes": names}, [f"several findings per picture: {shown}; none of them {numbers.count(0)}"]
    single = {"singled_out": names[1:]} if len(names) == 2 else {}
    return {"classes": names, **single}, [f"images of each class: {shown}"]


def _mask_classes(
    items: Sequence[Item], classes: list[str], named: dict[int, str], regions: dict[str, list[int]]
) -> tuple[dict[str, Any], list[str]]:
    """Classes and meaning of the values in masks, and facts that count them; what is no name is a ValueError."""
    counts, unread = Counter[float](), list[str]()
    for file in (file for item in progress(items, desc="read masks", delay=1) for file in label_files(item)):
        try:
            held = np.unique(volumes.read_volume(file)[0] if is_volume(file) else masks.raw_mask(file))
        except ValueError as error:
            if has_suffix(file, [DICOM_SUFFIX, *VOLUME_SUFFIXES]):
                raise
            unread.append(str(error))
            continue
        if held[0] < 0:
            raise ValueError(f"{file} holds the label {held[0]:g}: write labels from 0 on, 0 for the background.")
        counts.update(held.tolist())
    if not counts:
        raise DataProblems([problem.replace(masks.HOW, "save it as class indices") for problem in unread])
    values = sorted(counts)
    shown = ", ".join(f"{value:g} in {counts[value]}" for value in values[: masks.LARGEST_INDEX])
    facts = [f"values in the masks, and in how many: {shown}{' ...' if len(values) > masks.LARGEST_INDEX else ''}"]
    facts += [f"{len(unread)} mask(s) are not understood: {unread[0]}"] if unread else []
    if len(values) < 2:
        raise ValueError(f"All masks hold the value {values[0]:g} alone: give some with what is to be found.")
    small = [value for value in values if value != masks.IGNORED]
    codes: str | dict[str, int | str] = "auto"
    kept = [value for value, name in named.items() if name != "ignore"]
    if named and len(classes or kept) == len(kept):
        classes = classes or [named[value] for value in kept]
        if kept != list(range(len(kept))) or len(kept) < len(named):
            codes = dict[str, int | str]((str(v), kept.index(v) if v in kept else "ignore") for v in named)
    elif len(values) > masks.LARGEST_INDEX or values in ([0, 255], [0, 65535]):  # grey levels around edges, or a scale
        classes = classes or ["background", "foreground"]
        if len(classes) != 2:
            raise ValueError(f"The masks are of grey levels, background and one class, not {len(classes)} --classes.")
    elif small and 0 < max(small) < masks.LARGEST_INDEX:  # class indices, 255 for no label
        needed = int(max(small)) + 1
        classes = classes or ["background", *(f"class {number}" for number in range(1, max(needed, 2)))]
        if len(classes) < needed:
            raise ValueError(f"The masks hold the values {shown}: give {needed} --classes, background first.")
    else:
        classes = classes or ["background", *(f"value {value:g}" for value in values[1:])]
        if len(classes) != len(values):
            raise ValueError(f"The masks hold the values {shown}: give {len(values)} --classes, one for each.")
        codes = {f"{value:g}": number for number, value in enumerate(values)}
    found: dict[str, Any] = {"classes": classes, "mask_codes": codes}
    if len(classes) == len(kept) and regions:
        found["regions"] = {name: [kept.index(value) for value in values] for name, values in regions.items()}
    return found, facts


def _pictures(items: Sequence[Item]) -> tuple[list[str], dict[str, Any]]:
    """Facts about pictures; the side that the student sees, and whether they are grey."""
    sizes = np.array([picture_frame(item["image"])[0] for item in items])
    shorter = float(np.median(sizes.min(axis=1)))
    side = int(min(LARGEST_SIDE, max(32, 32 * round(shorter / 32))))
    grey = all((p == p[..., :1]).all() for p in (read_picture(item["image"]) for item in spread(items, LOOKED_AT)))
    low, middle, high = (" x ".join(f"{v:g}" for v in f(sizes, axis=0)) for f in (np.min, np.median, np.max))
    facts = [f"sizes: {low} to {high}, median {middle} pixels; the student sees {side} x {side}"]
    facts.append("grey pictures" if grey else "colour pictures")
    return facts, {"modality": facts[-1][:-1], "image_size": side, **({} if grey else {"colour": 0.1, "gamma": ABSENT})}


def _volumes(items: Sequence[Item], description: dict[str, Any], modality: str) -> tuple[list[str], dict[str, Any]]:
    """Facts about volumes; the grid that the student sees and, of a CT, the window of its labels in HU."""
    grids = [case_grid([item["image"]])[0].reordered("RAS") for item in items]
    spacings, shapes = (np.array([getattr(grid, key) for grid in grids], float) for key in ("spacing", "shape"))
    spacing, extent = np.median(spacings, axis=0), (shapes * spacings).max(axis=0)
    through = int(spacing.argmax()) if spacing.max() > 1.2 * spacing.min() else 2
    axes, order = SLICES[through]
    spacing, extent = spacing[order], extent[order]
    spacing[1:] = np.maximum(spacing[1:], extent[1:] / LARGEST_SIDE)
    spacing = spacing.round(4)
    size = [-1, *(32 * np.ceil((extent[1:] / spacing[1:] - 0.5) / 32).astype(int)).tolist()]
    inside: list[np.ndarray] = []
    for item in spread(items, LOOKED_AT):
        channels, grid = read_case([item["image"]])
        array = channels[0]
        if array.min() > volumes.HIGHEST_MINIMUM or modality not in ("", "CT"):
            inside.clear()
            break
        meaning = len(description["classes"]), description["mask_codes"]
        label, _ = volumes.read_label_volume(item["label"], grid, *meaning)
        inside.append(array[(label > 0) & (label != masks.IGNORED)][:: max(1, label.size // 10**6)])
    facts = [
        f"spacing: median {' x '.join(f'{v:g}' for v in np.median(spacings, axis=0))} mm (left-right, back-front, up)",
        f"the student sees slices of {size[1]} x {size[2]} at {spacing[1]:g} x {spacing[2]:g} mm, {spacing[0]:g} apart",
    ]
    found: dict[str, Any] = {"axes": axes, "spacing": spacing.tolist(), "volume_size": size, "modality": "MRI"}
    description["values"] = "any"
    if sum(map(len, inside)):
        low, high = np.percentile(np.concatenate(inside), WINDOW)
        margin = max(50.0, (high - low) / 2)
        found |= {"modality": "CT", "low": round(float(low - margin)), "high": round(float(high + margin))}
        description["values"] = "ct"
        facts.append(f"CT, by its values; window {found['low']} to {found['high']} HU, around the labels")
    return facts, found


def _part(name: str, task: Task, found: dict[str, Any]) -> dict[str, Any]:
    """The bundle's own part, merged onto those of its kind of data."""
    classes, masked, flat, several = task.classes, not task.is_classification, task.dimensions == 2, task.has_findings
    size = [found["image_size"]] * 2 if flat else found["volume_size"][1:]
    about = f"{', '.join(classes[1:] if masked else classes)} in {task.modality}"
    does = "outlines" if masked else "finds" if several else "tells apart"
    inputs = [
        f"{of}{c}" for c in task.channels for of in ([""] if flat else ["previous slice of ", "", "next slice of "])
    ]
    channels = {"shown_channels": "$@datalist.task.shown_channels" if inputs else ABSENT}
    values = {"colour": ABSENT, "gamma": 0.4, **found, "about": about, "does": f"{does} {about}", "kind": task.kind}
    values |= {"listed": ", ".join(map("{0[0]} is {0[1]}".format, enumerate(classes))), "classes": len(classes)}
    values |= {"modality": task.modality, "metric": task.primary_metric, "foreground": classes[1], "height": size[0]}
    values |= {"shown": f"{'pictures' if flat else 'slices'} of {size[0]} x {size[1]}", "width": size[1]}
    values |= {"answered": size if masked else [], "in_channels": len(inputs) or ABSENT, **channels}
    if not flat:
        how = ("window", "<ct_window>") if "low" in found else ("percentiles", "<shares>")
        values |= {"window": [], "percentiles": [], how[0]: [how[1]]}
    named = dict(zip(map(str, range(max(3, len(inputs)))), [*inputs, *[ABSENT] * 3], strict=False))
    shown = {"num_channels": len(inputs), "format": "magnitude", "channel_def": named} if inputs else {}
    answers = {"channel_def": {str(number): label for number, label in enumerate(task.answers)}}
    kind, volumetric = "classification" if several else task.kind, [] if flat else ["volumes"]
    own = ["own", *(f"own_{part}" for part in volumetric), *([task.kind] if several else [])]
    return {
        "parts": ["common", "single", kind, *volumetric, *own],
        "values": values,
        "train": {"mask_codes": task.mask_codes} if masked else {},
        "metadata": {"network_data_format": {"inputs": {"image": shown}, "outputs": {"pred": answers}}},
    }
