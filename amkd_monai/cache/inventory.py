"""Which stores lie in a folder, what they hold, and which of them nothing will ask for again; no torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amkd_monai.atomic import exclusive_lock
from amkd_monai.cache.manifest import NAME
from amkd_monai.cache.store import LOCK, FeatureStore, StoreError


@dataclass
class StoredTeacher:
    """One store as found on the disk.

    Attributes:
        directory: its folder, ``<teacher>-<key>``.
        store: opened, sizes checked; None where it cannot be.
        fault: why it cannot be opened.
        size: bytes of all its files.
        modified: when its manifest was last written, seconds since the epoch.
    """

    directory: Path
    store: FeatureStore | None
    fault: str
    size: int
    modified: float

    @property
    def name(self) -> str:
        """Name of the teacher; answers of probes and cross-fitted networks end in ``-answers``."""
        return self.directory.name.rpartition("-")[0]

    @property
    def done(self) -> tuple[int, int]:
        """Complete shards and all shards."""
        if self.store is None:
            return 0, 0
        return len(self.store.committed), len(self.store.committed) + len(self.store.missing())

    @property
    def state(self) -> str:
        """``complete``, ``incomplete (3 of 8 shards)`` or ``damaged``; ``building`` while a process writes."""
        complete, shards = self.done
        if self.store is None:
            return "damaged"
        if complete == shards:
            return "complete"
        return f"{'building' if (self.directory / LOCK).exists() else 'incomplete'} ({complete} of {shards} shards)"


def bytes_per_image(store: FeatureStore) -> float:
    """Stored bytes per image over all views, from the shards that are complete; 0 where there is none."""
    stored = sum(record["bytes"] for files in store.committed.values() for record in files.values())
    images = sum(len(store.samples_of(shard)) for _, shard in store.committed) / store.views
    return stored / images if images else 0.0


def find_stores(folder: str | Path) -> list[StoredTeacher]:
    """Open every store below a folder.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the cache_dir of a run, such as bundles/.cache.")
    return [_found(manifest) for manifest in sorted(Path(folder).rglob(NAME))]


def _found(manifest: Path) -> StoredTeacher:
    directory, store, fault = manifest.parent, None, ""
    try:
        store = FeatureStore.open(directory, check="size")
    except StoreError as error:
        fault = str(error)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return StoredTeacher(directory, store, fault, size, manifest.stat().st_mtime)


def format_stores(found: Sequence[StoredTeacher], folder: str | Path) -> str:
    """Table of stores: teacher, images, views, arrays, size, state."""
    header = ("data set", "teacher", "images", "views", "arrays", "kB/image", "MB", "state", "folder")
    rows = [header]
    for entry in found:
        store, place = entry.store, entry.directory.parent
        what = ("-",) * 4
        if store is not None:
            arrays = (f"{n} {spec.dtype} {'x'.join(map(str, spec.shape))}" for n, spec in store.arrays.items())
            what = (str(len(store)), str(store.views), ", ".join(arrays), f"{bytes_per_image(store) / 1e3:.1f}")
        size = f"{entry.size / 1e6:.1f}"
        rows.append((place.name, entry.name, *what, size, entry.state, str(entry.directory.relative_to(folder))))
    if len(rows) == 1:
        return f"{folder} holds no feature store."
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    faults = [entry.fault for entry in found if entry.fault]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *faults])


def useless(found: Iterable[StoredTeacher]) -> dict[Path, str]:
    """Say of each store that no run can use as it is why: ``{folder: reason}``.

    That is a store that is damaged or incomplete, whose decoded images are gone, or of whose images or teacher there
    is a newer store: same teacher name and samples, other weights, preprocessing or image contents.
    """
    entries, reasons = list(found), {}
    for entry in entries:
        store = entry.store
        if store is None:
            reasons[entry.directory] = entry.fault
        elif not store.is_complete:
            reasons[entry.directory] = entry.state
        elif not (entry.directory.parent / str(store.key.get("decoded")) / "index.json").is_file():
            reasons[entry.directory] = "stale: the decoded images it belongs to are gone"
        elif newer := next((other for other in entries if _replaces(other, entry)), None):
            reasons[entry.directory] = f"stale: {_changed(newer, entry)} since; {newer.directory.name} is newer"
    return reasons


def _changed(new: StoredTeacher, old: StoredTeacher) -> str:
    """What differs between two stores of one teacher name and one list of samples; empty if nothing that matters."""
    assert new.store is not None and old.store is not None
    if new.store.content_hashes != old.store.content_hashes:
        return "images changed"
    parts = [part for part in ("teacher", "preprocessing") if new.store.key.get(part) != old.store.key.get(part)]
    return f"the {' and '.join(parts)} changed" if parts else ""


def _replaces(new: StoredTeacher, old: StoredTeacher) -> bool:
    if new.store is None or old.store is None or new.modified <= old.modified or not new.store.is_complete:
        return False
    same = (new.directory.parent, new.name) == (old.directory.parent, old.name) and "preprocessing" in old.store.key
    return same and new.store.sample_ids == old.store.sample_ids and bool(_changed(new, old))


def prune(reasons: Iterable[Path]) -> None:
    """Remove stores.

    Raises:
        TimeoutError: a process is writing one of them.
        OSError: a folder cannot be removed.
    """
    for directory in reasons:
        with exclusive_lock(directory / LOCK):
            (directory / NAME).unlink(missing_ok=True)  # what follows is no store from here on, even if interrupted
        shutil.rmtree(directory)
