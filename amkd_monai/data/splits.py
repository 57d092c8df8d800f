"""Splits that never cut a group (a patient, a volume, a cluster of duplicates), and the groups of duplicates.

An item is a dict with "image", "id", "group" and, where it is known, "label". Every result depends on ids, groups and
seed only. Own code: scikit-learn's group splitters do not balance three sections by size and class, and the hash of a
split is a promise beyond its versions.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from amkd_monai import storage
from amkd_monai.files.cases import is_volume, read_case
from amkd_monai.files.dicom import patient_and_study
from amkd_monai.files.names import DICOM_SUFFIX, files_of, has_suffix
from amkd_monai.files.pictures import opened, to_rgb, upright
from amkd_monai.files.volumes import grey_levels, reorder
from amkd_monai.terminal import logger, progress

PATIENT = "patient "  # how the groups of DICOM images of one patient begin

Item = dict[str, Any]
Sections = tuple[list[Item], list[Item], list[Item]]


@dataclass(frozen=True)
class SplitOptions:
    """How a data set is divided where its own split does not decide; a data set takes what it can use."""

    fractions: Sequence[float] = (0.7, 0.15, 0.15)  # of train, validation and test, where items are split at random
    folds: int | None = None  # in place of all other sections; None: as the data set has it
    fold: int = 0  # the fold that is the test section
    seed: int = 0  # of everything that is drawn


DEFAULT_SPLIT = SplitOptions()


def random_split(items: Iterable[Item], fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0) -> Sections:
    """Split items at random into train, validation and test, each sorted by id, by whole groups.

    Groups go, largest first, to the section that misses most items; groups of one size are shuffled. Every section with
    a fraction above zero gets at least one group. Where labels are classes, every class is split by itself, the rarest
    first. Fractions that are not three shares of sum 1, a repeated id, or fewer groups than sections are a ValueError.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"Split fractions {tuple(fractions)} are not usable: give three shares that sum to 1.")
    items = _sorted_by_id(items)
    sizes, strata = Counter(item["group"] for item in items), _strata(items)
    empty = {section for section, fraction in enumerate(fractions) if fraction > 0}
    if len(sizes) < len(empty):
        raise ValueError(f"{len(sizes)} group(s) cannot fill {len(empty)} sections of a split: set a fraction to 0.")
    totals = Counter(strata[item["group"]] for item in items)
    missing = {stratum: [fraction * n for fraction in fractions] for stratum, n in totals.items()}
    open_sections, section_of = sorted(empty), dict[str, int]()
    for group in _in_order(sizes, strata, seed):
        candidates = sorted(empty) if len(sizes) - len(section_of) <= len(empty) else open_sections
        missing_here = missing[strata[group]]
        section = section_of[group] = max(candidates, key=lambda candidate: missing_here[candidate])
        missing_here[section] -= sizes[group]
        empty.discard(section)
    train, validation, test = ([item for item in items if section_of[item["group"]] == section] for section in range(3))
    return train, validation, test


def k_fold(
    items: Iterable[Item], folds: int = 5, fold: int = 0, validation_fraction: float = 0.2, seed: int = 0
) -> Sections:
    """Cross-validation: test is one fold, validation a part of the rest (one group at least), by whole groups.

    Folds are those of :func:`fold_of_groups`. A repeated id, fewer than 3 groups, an unknown fold or a fraction outside
    (0, 1) is a ValueError.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"The validation fraction is {validation_fraction}: give one between 0 and 1.")
    items = _sorted_by_id(items)
    groups = [item["group"] for item in items]
    if len(set(groups)) < 3:
        raise ValueError(f"{len(set(groups))} group(s) cannot fill train, validation and test: at least 3 are needed.")
    strata = _strata(items)
    fold_of_item = fold_of_groups(groups, folds, seed, [strata[group] for group in groups])
    used_folds = int(fold_of_item.max()) + 1
    if not 0 <= fold < used_folds:
        raise ValueError(f"There is no fold {fold}: choose one from 0 to {used_folds - 1}.")
    test, rest = ([items[i] for i in np.flatnonzero(chosen)] for chosen in (fold_of_item == fold, fold_of_item != fold))
    if len({item["group"] for item in rest}) < 2:
        raise ValueError(f"Fold {fold} leaves one group for train and validation: use more folds.")
    train, validation, _ = random_split(rest, (1 - validation_fraction, validation_fraction, 0), seed)
    return train, validation, test


def fold_of_groups(
    groups: Sequence[str], folds: int, seed: int = 0, classes: Sequence[int] | Sequence[str] | np.ndarray | None = None
) -> np.ndarray:
    """Assign each sample to a fold, int64 (N,), so that no group is cut and folds have about equal sizes.

    With fewer groups than folds there are as many folds as groups. With ``classes``, one per sample, folds have about
    equal numbers of each. The seed shuffles groups of one size. Fewer than 2 folds or groups are a ValueError.
    """
    sizes = Counter(groups)
    if folds < 2:
        raise ValueError(f"{folds} fold(s) cannot be held out in turn: use at least 2 folds.")
    if len(sizes) < 2:
        raise ValueError(f"{len(sizes)} group(s) cannot be split into folds: at least 2 groups are needed.")
    strata = _majority(zip(groups, [""] * len(groups) if classes is None else map(str, classes), strict=True))
    used = min(folds, len(sizes))
    of_stratum = {stratum: [0] * used for stratum in strata.values()}
    samples_in_fold, fold_of = [0] * used, dict[str, int]()
    for group in _in_order(sizes, strata, seed):
        own = of_stratum[strata[group]]
        fold = fold_of[group] = min(range(used), key=lambda k: (own[k], samples_in_fold[k]))
        own[fold] += sizes[group]
        samples_in_fold[fold] += sizes[group]
    return np.array([fold_of[group] for group in groups], dtype=np.int64)


def few_labels(train: Iterable[Item], count: int, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Keep up to ``count`` training items labelled; return them and the others without "label", each sorted by id.

    Whole groups are kept, in shuffled order, as long as they fit. With groups of one item the labelled sets of one seed
    are nested. A ``count`` out of range, or below the smallest group, is a ValueError.
    """
    train = _sorted_by_id(train)
    if not 1 <= count <= len(train):
        raise ValueError(f"Cannot keep {count} of {len(train)} training items labelled: use 1 to {len(train)}.")
    sizes, kept, room = Counter(item["group"] for item in train), set[str](), count
    for group in _shuffled(sizes, seed):
        if sizes[group] <= room:
            kept.add(group)
            room -= sizes[group]
    if not kept:
        raise ValueError(f"{count} labelled items would cut a group: the smallest group has {min(sizes.values())}.")
    rest = [without(item, "label") for item in train if item["group"] not in kept]
    return [item for item in train if item["group"] in kept], rest


def without(item: Item, key: str) -> Item:
    """Return a copy of an item without a key."""
    return {k: v for k, v in item.items() if k != key}


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most ``count`` items, evenly over the list."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def split_hash(**sections: Iterable[Item]) -> str:
    """SHA-256 (64 hexadecimal digits) of ids and groups per section, independent of order and paths."""
    members = {name: sorted([item["id"], item["group"]] for item in items) for name, items in sections.items()}
    return hashlib.sha256(json.dumps(members, sort_keys=True).encode()).hexdigest()


def _sorted_by_id(items: Iterable[Item]) -> list[Item]:
    """Sort items by id; an id that comes twice is refused."""
    ordered = sorted(items, key=lambda item: item["id"])
    if twice := [a["id"] for a, b in pairwise(ordered) if a["id"] == b["id"]]:
        raise ValueError(f"The id '{twice[0]}' appears twice in the datalist: ids must be unique.")
    return ordered


def _shuffled(groups: Iterable[str], seed: int) -> list[str]:
    names = sorted(groups)
    return [names[index] for index in np.random.default_rng(seed).permutation(len(names))]


def _in_order(sizes: Mapping[str, int], strata: Mapping[str, str], seed: int) -> list[str]:
    """Groups of the stratum with fewest items first, within it the largest first, those of one size shuffled."""
    count = Counter[str]()
    for group, size in sizes.items():
        count[strata[group]] += size
    return sorted(_shuffled(sizes, seed), key=lambda group: (count[strata[group]], strata[group], -sizes[group]))


def _strata(items: Sequence[Item]) -> dict[str, str]:
    """The class of each group: the label where it is one, else the item's "class"; "" where there is neither."""
    classes = (str(i["label"]) if isinstance(i.get("label"), int) else i.get("class", "") for i in items)
    return _majority(zip((item["group"] for item in items), classes, strict=True))


def _majority(samples: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The most frequent class of each group, the first of equals; duplicates may have conflicting classes."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group, label in samples:
        counts[group][label] += 1
    return {group: min(found, key=lambda c: (-found[c], c)) for group, found in counts.items()}


HASH_SIZE = 16  # side of the perceptual hash: 256 bits

NEAR = 32
"""Bits in which near-duplicates differ at most. Measured on the data sets named in the project: copies with calipers,
text, other brightness or JPEG quality differ by up to 28 bits, different pictures of one kind by 36 or more."""


def identical(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of items whose images are byte-identical, each with the first of its kind."""
    sizes = [sum(storage.size_and_time(file)[0] for file in files_of(item["image"])) for item in items]
    shared, first, pairs = Counter(sizes), dict[str, int](), []
    for number, (item, size) in enumerate(zip(items, sizes, strict=True)):
        if shared[size] > 1:
            content = storage.joint_hash([storage.file_sha256(file) for file in files_of(item["image"])])
            if (other := first.setdefault(content, number)) != number:
                pairs.append((other, number))
    return pairs


def patients_of(items: Iterable[Item]) -> dict[str, str]:
    """Map DICOM images, by path, to their patient in a form that tells no name; to their study if all have one patient.

    Other images, and those that name neither, are left out.
    """
    paths = [file for item in items for file in files_of(item["image"])]
    found = {p: patient_and_study(Path(p)) for p in paths if Path(p).is_dir() or has_suffix(p, [DICOM_SUFFIX])}
    known = len({patient for patient, _ in found.values()}) > 1
    named = {path: patient if known and patient else study for path, (patient, study) in found.items()}
    return {path: f"{PATIENT}{storage.fingerprint(name)[:16]}" for path, name in named.items() if name}


def group_patients(items: Sequence[Item]) -> list[Item]:
    """Put DICOM images of one patient that are groups of their own into one; see :func:`patients_of`."""
    alone = [item for item in items if item["group"] == item["id"] and "problem" not in item]
    patients = patients_of(alone)
    of_item = {item["id"]: patients.get(files_of(item["image"])[0], "") for item in alone}
    counts = Counter(of_item.values())
    if len(counts) < 2:  # none is named, or all are of one: nothing to keep apart
        return list(items)
    several = {name: patient for name, patient in of_item.items() if patient and counts[patient] > 1}
    return [{**item, "group": several.get(item["id"], item["group"])} for item in items]


def joined(items: Sequence[Item], pairs: Sequence[tuple[int, int]]) -> list[Item]:
    """Return copies of items whose groups (else ids) are joined where a pair of indices links them, names by "+"."""
    first, names = dict[str, int](), [str(item.get("group", item["id"])) for item in items]
    pairs = [*pairs, *((first.setdefault(name, number), number) for number, name in enumerate(names))]
    groups: dict[int, str] = {}
    for members in clusters(len(items), pairs):
        groups |= dict.fromkeys(members, "+".join(sorted({names[index] for index in members})))
    return [{**item, "group": groups[index]} for index, item in enumerate(items)]


def perceptual_hashes(paths: Sequence[str], cache_dir: str | Path | None = None) -> list[str]:
    """Hash images by their coarse look (`imagehash.phash`): 64 hexadecimal digits each.

    Of a volume that is its middle slice from below, upright, so that a copy in another file, order or unit is the same.
    ``cache_dir`` keeps the hashes by content. Files that cannot be read are announced; their hash is empty.
    """
    memo = None if cache_dir is None else Path(cache_dir) / f"perceptual_hashes_{HASH_SIZE}.json"
    contents = storage.content_hashes(paths, cache_dir)
    known = storage.read_memo(memo, lambda v: isinstance(v, str) and len(v) == HASH_SIZE**2 // 4)
    missing = {content: path for content, path in zip(contents, paths, strict=True) if content not in known}
    for content, path in progress(missing.items(), desc="compare images", delay=1):
        try:
            known[content] = _hash(path)
        except (OSError, SyntaxError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and is compared with no other image", path, error)
    if missing.keys() & known.keys():
        storage.write_memo(memo, known)
    return [known.get(content, "") for content in contents]


def _hash(path: str) -> str:
    import imagehash

    if is_volume(path):
        channels, grid = read_case([path])
        levels = grey_levels(reorder(channels[0], grid, "RAS"))
        return str(imagehash.phash(Image.fromarray(levels[..., levels.shape[2] // 2]), hash_size=HASH_SIZE))
    with opened(path) as image:
        image.draft("L", (8 * HASH_SIZE, 8 * HASH_SIZE))
        shown = upright(image)
    grey = (to_rgb(shown) if shown.mode[0] in "IF" else shown).convert("L")
    return str(imagehash.phash(grey, hash_size=HASH_SIZE))


def near_duplicates(
    items: Sequence[Item], distance: int = NEAR, cache_dir: str | Path | None = None
) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of items whose first files have hashes that differ in at most ``distance`` bits."""
    return near_pairs(perceptual_hashes([files_of(item["image"])[0] for item in items], cache_dir), distance)


def near_pairs(hashes: Sequence[str], distance: int = NEAR) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of hexadecimal hashes, unless empty, that differ in at most ``distance`` bits."""
    known = [number for number, text in enumerate(hashes) if text]
    rows_of_bytes = [list(bytes.fromhex(hashes[number])) for number in known] or np.empty((0, 1))
    bits = np.unpackbits(np.array(rows_of_bytes, np.uint8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(signs), 512):
        differing = (bits.shape[1] - signs[start : start + 512] @ signs.T) / 2  # (rows, N)
        rows, columns = np.nonzero(differing <= distance + 0.5)
        pairs += [(known[i + start], known[j]) for i, j in zip(rows, columns, strict=True) if i + start < j]
    return pairs


def clusters(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Join pairs to clusters: indices 0 to ``count`` - 1, each in one sorted cluster, clusters sorted."""
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    links = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    number, labels = connected_components(links, directed=False)
    return sorted(np.flatnonzero(labels == label).tolist() for label in range(number))
