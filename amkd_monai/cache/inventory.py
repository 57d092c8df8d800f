"""Lists the stores in a folder, their content, and which are stale; no torch."""

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amkd_monai.cache.store import LOCK, NAME, FeatureStore, StoreError
from amkd_monai.storage import exclusive_lock
from amkd_monai.terminal import align


@dataclass
class StoredTeacher:
    """One store as found on the disk, in ``<teacher>-<key>``; the store is None where it cannot be opened."""

    directory: Path
    name: str  # of the teacher
    modified: float  # seconds since the epoch
    store: FeatureStore | None = None
    fault: str = ""
    size: int = 0  # bytes of all its files
    state: str = "damaged"  # or complete, or incomplete (3 of 8 shards)


def find_stores(folder: str | Path) -> list[StoredTeacher]:
    """Open every store below a folder."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the cache_dir of a run, such as bundles/.cache.")
    found = []
    for file in sorted(root.rglob(NAME)):
        entry = StoredTeacher(file.parent, file.parent.name.rpartition("-")[0], file.stat().st_mtime)
        try:
            entry.store = store = FeatureStore.open(file.parent)
            there, shards = len(store.written()), len(store.shards)
            entry.state = "complete" if there == shards else f"incomplete ({there} of {shards} shards)"
        except StoreError as error:
            entry.fault = str(error)
        for path in file.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a temporary file of a builder
                entry.size += path.stat().st_size
        found.append(entry)
    return found


def format_stores(found: Sequence[StoredTeacher], folder: str | Path) -> str:
    """Table of stores: teacher, images, views, arrays, size, state."""
    rows = [("data set", "teacher", "images", "views", "arrays", "kB/image", "MB", "state", "folder")]
    for entry in found:
        store, what = entry.store, ("-",) * 4
        if store is not None:
            arrays = (f"{n} {spec.dtype} {'x'.join(map(str, spec.shape))}" for n, spec in store.arrays.items())
            what = (str(len(store)), str(store.views), ", ".join(arrays), f"{store.bytes_per_image / 1e3:.1f}")
        place = str(entry.directory.relative_to(folder))
        rows.append((entry.directory.parent.name, entry.name, *what, f"{entry.size / 1e6:.1f}", entry.state, place))
    if len(rows) == 1:
        return f"{folder} holds no feature store."
    return "\n".join([align(rows, left=None, ruled=True), *(entry.fault for entry in found if entry.fault)])


def useless(found: Iterable[StoredTeacher]) -> dict[Path, str]:
    """Return the stores that no run can use as they are, and why: ``{folder: reason}``.

    A store is useless if it is damaged, incomplete, of an older format, orphaned (its decoded images were deleted) or
    superseded: a newer one has the same teacher name and samples with other weights, preprocessing or image contents.
    """
    entries, reasons = list(found), {}
    for entry in entries:
        if entry.store is None or entry.state != "complete":
            reasons[entry.directory] = entry.fault or entry.state
        elif not (entry.directory.parent / str(entry.store.key.get("decoded")) / "index.json").is_file():
            reasons[entry.directory] = "stale: the decoded images it belongs to are gone"
        else:
            for other in entries:
                if change := _superseded(entry, other):
                    reasons[entry.directory] = f"stale: {change} since; {other.directory.name} is newer"
    return reasons


def _superseded(entry: StoredTeacher, other: StoredTeacher) -> str:
    """What changed between a store and a newer one of the same teacher name and samples; empty if it is none."""
    old, new = entry.store, other.store
    if old is None or new is None or other.modified <= entry.modified or other.state != "complete":
        return ""
    same = (entry.directory.parent, entry.name) == (other.directory.parent, other.name) and "preprocessing" in old.key
    if not same or old.sample_ids != new.sample_ids:
        return ""
    if old.content_hashes != new.content_hashes:
        return "images changed"
    parts = [part for part in ("teacher", "preprocessing") if old.key.get(part) != new.key.get(part)]
    return f"the {' and '.join(parts)} changed" if parts else ""


def prune(folders: Iterable[Path]) -> None:
    """Remove stores; one that a process is building is refused with a TimeoutError."""
    for directory in folders:
        with exclusive_lock(directory / LOCK):
            shutil.rmtree(directory)
