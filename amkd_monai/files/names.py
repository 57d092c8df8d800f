"""File names: which files are images, their ids, and how tables and lists are read."""

import csv
import gzip
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from amkd_monai.storage import read_text
from amkd_monai.terminal import logger

DICOM_SUFFIX = ".dcm"
PICTURE_SUFFIXES = (".bmp", DICOM_SUFFIX, ".jpeg", ".jpg", ".png", ".tif", ".tiff")
VOLUME_SUFFIXES = (".nii.gz", ".nii")
SUFFIXES = (*PICTURE_SUFFIXES, *VOLUME_SUFFIXES)
COMPANIONS = (".csv", ".db", ".htm", ".html", ".ini", ".json", ".log", ".md", ".pdf", ".txt", ".tsv", ".xml", ".yaml")
"""Endings of files beside images that are left out without a word; all others are named."""

CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
MARK = "amkd_monai prediction"  # stands in every file that a prediction writes, so that it is no image to predict
_MARKS = re.compile(MARK.encode() + rb"|\x08\0\x70\0(LO\n\0|\n\0\0\0)amkd_monai")  # of DICOM it is the manufacturer
_DERIVED = re.compile(r"(?P<image>.+?)_(mask(_\d+)?|overlay|segmentation|superpixels)")  # belong to an image


class DataProblems(ValueError):
    """Several things are wrong with a data set; ``problems`` holds one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" There are {len(problems) - 1} more problems like this: `data check` lists them all."
        super().__init__(problems[0] + (more if len(problems) > 1 else ""))
        self.problems = list(problems)


def has_suffix(file: str | Path, suffixes: Sequence[str]) -> bool:
    """Whether a name ends with one of the suffixes, in upper or lower case."""
    return str(file).lower().endswith(tuple(suffixes))


def is_slice(file: Path) -> bool:
    """Whether a file is DICOM by its name or its first bytes, and not written by a prediction."""
    with file.open("rb") as stream:
        head = stream.read(4096)
    marked = head[128:132] == b"DICM" or (head[:2] in (b"\x02\x00", b"\x08\x00") and len(head) >= 132)
    return (marked or has_suffix(file.name, [DICOM_SUFFIX])) and not _MARKS.search(head)


def file_id(file: Path) -> str:
    """Return the name without its suffix, ``.nii.gz`` counting as one, in printable form; a folder's whole name."""
    suffix = "" if file.is_dir() else next((s for s in VOLUME_SUFFIXES if has_suffix(file.name, [s])), file.suffix)
    return printable(file.name[: len(file.name) - len(suffix)])


def printable(name: str) -> str:
    """Return a file name with ``%XX`` for bytes that are not UTF-8 and for control characters."""
    name = os.fsencode(name).decode("utf-8", "surrogateescape")
    return "".join(f"%{ord(c) & 0xFF:02X}" if "\udc80" <= c <= "\udcff" or c < " " or c == "\x7f" else c for c in name)


def file_of(folder: Path, name: str) -> Path:
    """Return a file of a folder whose name is made from an id, under ASCII locales too."""
    return folder / os.fsdecode(name.encode())


def image_files(folder: Path, suffixes: Sequence[str] = PICTURE_SUFFIXES) -> list[Path]:
    """List a folder's own visible files with one of the suffixes, sorted; dead links and other formats are named.

    Among volumes, slices of DICOM are not: a series is a folder.
    """
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    wanted = [file for file in files if has_suffix(file, suffixes)]
    others = [file for file in files if not has_suffix(file, (*suffixes, *COMPANIONS)) and file.is_file()]
    unread = [printable(f.name) for f in others if suffixes != VOLUME_SUFFIXES or not is_slice(f)]
    dead = [file_id(file) for file in wanted if file.is_symlink() and not file.is_file()]
    left_out(folder, unread, "file(s) of a format that is not read here")
    left_out(folder, dead, "dead link(s)")
    return [file for file in wanted if file.is_file()]


def left_out(place: object, names: Sequence[str], what: str = "file(s)") -> None:
    """Warn of what takes no part in a run, if there is anything."""
    if names:
        logger.warning("%d %s in %s are left out: %s.", len(names), what, place, some(names))


def warn_of_deeper(folder: Path, known: Sequence[Path] = ()) -> None:
    """Name the files in folders below a folder, which are not read, but for those in folders that are known."""
    below = (child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    files = [f for child in sorted(below) if child not in known for f in sorted(child.rglob("[!.]*"))]
    files = [f for f in files if f.is_file() and not has_suffix(f, COMPANIONS)]
    left_out(f"folders below {folder}", [printable(str(f.relative_to(folder))) for f in files])


def originals(folder: Path, suffixes: Sequence[str] = PICTURE_SUFFIXES) -> list[Path]:
    """List the images of a folder as :func:`image_files` does, without masks, overlays and predictions of others."""
    files = image_files(folder, suffixes)
    stems = {file_id(file) for file in files}
    derived = [_DERIVED.fullmatch(file_id(file)) for file in files]
    kept = [f for f, m in zip(files, derived, strict=True) if not m or not (m["image"] in stems or is_prediction(f))]
    if len(kept) < len(files):
        logger.info("%d file(s) in %s are masks or predictions and are left out.", len(files) - len(kept), folder)
    return kept


def images_to_predict(
    folder: Path, suffixes: Sequence[str] = PICTURE_SUFFIXES, known: Sequence[Path] = ()
) -> dict[str, Path]:
    """Map id, with the suffix where two have one name, to file, of a folder's :func:`originals`; see warn_of_deeper."""
    if (kept := originals(folder, suffixes)) or known:
        warn_of_deeper(folder, known)
    ids, result = Counter(map(file_id, kept)), dict[str, Path]()
    for file in sorted(kept, key=lambda file: ids[file_id(file)]):
        name = file_id(file) if ids[file_id(file)] == 1 else printable(file.name)
        while name in result:
            name += "_"
        result[name] = file
    return dict(sorted(result.items()))


def channel_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, dict[int, str]]:
    """The files of each case of a folder by channel, named as nnU-Net does: ``case_0000.png``, ``case_0001.png``.

    Two files of one channel are a ValueError.
    """
    found, files = defaultdict[str, dict[int, str]](dict), image_files(folder, suffixes) if folder.is_dir() else []
    for file in files:
        if match := CHANNEL.fullmatch(file_id(file)):
            other = found[match["case"]].setdefault(int(match["channel"]), str(file))
            if other != str(file):
                raise ValueError(f"{other} and {file} have the same name: keep one of them.")
    left_out(folder, [file_id(f) for f in files if found and not is_channel(f)], "file(s) that name no channel")
    return dict(found)


def is_channel(file: Path) -> bool:
    """Whether a file is named as a channel of a case."""
    return CHANNEL.fullmatch(file_id(file)) is not None


def is_prediction(file: Path) -> bool:
    """Whether a prediction of this package wrote the file, by the mark in it."""
    with gzip.open(file) if has_suffix(file, [".gz"]) else file.open("rb") as stream:
        try:
            return _MARKS.search(stream.read(4096)) is not None
        except (OSError, EOFError):
            return False


def keep_others(path: Path) -> Path:
    """Return the path of a prediction to write; a file there that is none is a ValueError."""
    if path.is_file() and path.stat().st_size and not is_prediction(path):
        raise ValueError(f"{path} is there and is no prediction: give another folder for what is written.")
    return path


def group_in(name: str, expression: str) -> str:
    """Return what the first group of a regular expression finds in a name, "" if it finds nothing or has no group."""
    found = re.search(expression, name)
    return (found[1] or "") if found and found.groups() else ""


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which numbers within a name count as numbers: `benign (2)` comes before `benign (10)`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def some(names: Iterable[str]) -> str:
    """Join the first five names and count the others."""
    names = sorted(names, key=natural)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def table_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a table separated by comma, semicolon or tab: names of columns, and rows {name: cell} without blanks.

    A column that comes twice, or a row with more cells than there are columns, is a ValueError.
    """
    text = read_text(path).lstrip("\r\n")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, delimiter=separator)
    reader.fieldnames = found = [name.strip() for name in reader.fieldnames or []]
    if twice := [name for name, count in Counter(found).items() if name and count > 1]:
        raise ValueError(f"{path} has several columns {twice[0]}: rename all but one.")
    rows = list(reader)
    if longer := [number for number, row in enumerate(rows, 2) if any(row.get(None) or ())]:
        raise ValueError(
            f"{path} has more cells than columns in the line {longer[0]}: put cells with commas in quotes."
        )
    return found, [{name: (row[name] or "").strip() for name in found} for row in rows]


def label_files(item: Mapping[str, object]) -> list[str]:
    """Return the mask files of an item: one, several (combined by OR), or none where it is of classes."""
    return files_of(item.get("label"))


def files_of(value: object) -> list[str]:
    """Return one path or several, such as the channels of an image, as a list; none of what is no path."""
    files = [value] if isinstance(value, (str, os.PathLike)) else value
    return [str(f) for f in files if isinstance(f, (str, os.PathLike))] if isinstance(files, (list, tuple)) else []
