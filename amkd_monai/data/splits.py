"""Splits that never cut a group (a patient, a volume, a cluster of duplicates).

A datalist item is a dict with "image", "id", "group" and, where it is known, "label". Every function sorts
by id or group before it draws, so a result depends on ids, groups and seed only: not on the order of a folder
listing, not on the machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

logger = logging.getLogger("amkd_monai")

Item = dict[str, Any]
Sections = tuple[list[Item], list[Item], list[Item]]


@dataclass(frozen=True)
class SplitOptions:
    """How a data set is divided where its own split does not decide; a data set takes what it can use.

    Attributes:
        fractions: shares of train, validation and test, where items are split at random.
        folds: number of folds, where a data set is cross-validated.
        fold: the fold that is the test section.
        seed: of everything that is drawn.
    """

    fractions: Sequence[float] = (0.7, 0.15, 0.15)
    folds: int = 5
    fold: int = 0
    seed: int = 0


DEFAULT_SPLIT = SplitOptions()


def random_split(items: Iterable[Item], fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0) -> Sections:
    """Split items at random into train, validation and test, by whole groups.

    Groups go, largest first, to the section that misses most items; groups of one size are shuffled. Every
    section with a fraction above zero gets at least one group. Where labels are classes, every class is split
    by itself, the rarest first.

    Args:
        items: datalist items with "id" and "group".
        fractions: shares of train, validation and test; their sum is 1.
        seed: seed of the shuffle.

    Returns:
        Train, validation and test items, each sorted by id.

    Raises:
        ValueError: bad fractions, a repeated id, or fewer groups than sections.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"Split fractions {tuple(fractions)} are not usable: give three shares (train, validation, test) "
            "of at least 0 with the sum 1."
        )
    items = _sorted_by_id(items)
    sizes = Counter(item["group"] for item in items)
    wanted = sum(fraction > 0 for fraction in fractions)
    if len(sizes) < wanted:
        raise ValueError(
            f"{len(sizes)} group(s) cannot fill {wanted} sections of a split: add images of more patients, "
            "or set a fraction to 0."
        )
    strata = _strata(items)
    missing = {s: [fraction * n for fraction in fractions] for s, n in _items_per_stratum(sizes, strata).items()}
    empty = {section for section, fraction in enumerate(fractions) if fraction > 0}
    open_sections = sorted(empty)
    section_of: dict[str, int] = {}
    for group in _rarest_stratum_first(sizes, strata, seed):
        groups_left = len(sizes) - len(section_of)
        candidates = sorted(empty) if groups_left <= len(empty) else open_sections
        wanted_here = missing[strata[group]]
        section = max(candidates, key=lambda candidate: wanted_here[candidate])
        section_of[group] = section
        wanted_here[section] -= sizes[group]
        empty.discard(section)
    train, validation, test = ([item for item in items if section_of[item["group"]] == section] for section in range(3))
    return train, validation, test


def fixed_split(train: Iterable[Item], test: Iterable[Item], fractions: Sequence[float], seed: int = 0) -> Sections:
    """Split where the test section is given: validation is taken from the training items.

    Args:
        train: items of the given training section.
        test: items of the given test section; training items of their groups are left out, loudly.
        fractions: shares of train, validation and test; only the ratio of the first two counts.
        seed: seed of the choice of validation groups.

    Returns:
        Train, validation and test items, each sorted by id.
    """
    test = _sorted_by_id(test)
    test_groups = {item["group"] for item in test}
    train = _sorted_by_id(train)
    leaking = [item["id"] for item in train if item["group"] in test_groups]
    if leaking:
        logger.warning("Left out of train, as their images are also in the test section: %s.", ", ".join(leaking))
    share = fractions[0] / (fractions[0] + fractions[1])
    rest = [item for item in train if item["group"] not in test_groups]
    new_train, validation, _ = random_split(rest, (share, 1 - share, 0), seed)
    return new_train, validation, test


def k_fold(
    items: Iterable[Item], folds: int = 5, fold: int = 0, validation_fraction: float = 0.2, seed: int = 0
) -> Sections:
    """Cross-validation split: test is one fold, validation a part of the rest, by whole groups.

    Where labels are classes, folds have about equal numbers of each class.
    With fewer groups than folds there are as many folds as groups.

    Args:
        items: datalist items with "id" and "group".
        folds: number of folds, at least 2.
        fold: index of the fold that becomes the test section.
        validation_fraction: share of the items outside the fold that is used for validation; one group at
            least.
        seed: seed of the folds and of the choice of validation groups.

    Returns:
        Train, validation and test items, each sorted by id.

    Raises:
        ValueError: a repeated id, no such fold, a fraction not between 0 and 1, or fewer than 3 groups.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"The validation fraction {validation_fraction} must lie between 0 and 1.")
    items = _sorted_by_id(items)
    groups = [item["group"] for item in items]
    if len(set(groups)) < 3:
        raise ValueError(
            f"{len(set(groups))} group(s) cannot fill train, validation and test: cross-validation needs at "
            "least 3 groups."
        )
    strata = _strata(items)
    fold_of_item = fold_of_groups(groups, folds, seed, [strata[group] for group in groups])
    used_folds = int(fold_of_item.max()) + 1
    if not 0 <= fold < used_folds:
        raise ValueError(f"There is no fold {fold}: choose one from 0 to {used_folds - 1}.")
    rest = [item for item, index in zip(items, fold_of_item, strict=True) if index != fold]
    test = [item for item, index in zip(items, fold_of_item, strict=True) if index == fold]
    if len({item["group"] for item in rest}) < 2:
        raise ValueError(f"Fold {fold} leaves one group for train and validation: use more folds.")
    train, validation, _ = random_split(rest, (1 - validation_fraction, validation_fraction, 0), seed)
    return train, validation, test


def fold_of_groups(
    groups: Sequence[str], folds: int, seed: int = 0, classes: Sequence[int] | Sequence[str] | np.ndarray | None = None
) -> np.ndarray:
    """Assign each sample to a fold so that no group is cut and folds have about equal numbers of samples.

    Args:
        groups: group name of each sample.
        folds: number of folds, at least 2; with fewer groups than folds there are as many folds as groups.
        seed: seed of the shuffle of groups of one size.
        classes: class of each sample; folds then have about equal numbers of each class.

    Returns:
        Fold index of each sample, int64 of shape `(len(groups),)`.

    Raises:
        ValueError: fewer than 2 folds or fewer than 2 groups.
    """
    sizes = Counter(groups)
    if folds < 2:
        raise ValueError(f"{folds} fold(s) cannot be held out in turn: use at least 2 folds.")
    if len(sizes) < 2:
        raise ValueError(f"{len(sizes)} group(s) cannot be split into folds: at least 2 groups are needed.")
    strata = _majority(zip(groups, [""] * len(groups) if classes is None else map(str, classes), strict=True))
    used = min(folds, len(sizes))
    of_stratum = {stratum: [0] * used for stratum in strata.values()}
    samples_in_fold = [0] * used
    fold_of: dict[str, int] = {}
    for group in _rarest_stratum_first(sizes, strata, seed):
        own = of_stratum[strata[group]]
        fold = min(range(used), key=lambda k: (own[k], samples_in_fold[k]))
        fold_of[group] = fold
        own[fold] += sizes[group]
        samples_in_fold[fold] += sizes[group]
    return np.array([fold_of[group] for group in groups], dtype=np.int64)


def few_labels(train: Iterable[Item], count: int, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Keep `count` training items labelled; the others lose their "label".

    Whole groups are kept, in shuffled order, as long as they fit into `count`, so fewer items than `count`
    stay labelled when groups are large. With groups of one item the labelled sets of one seed are nested:
    those of 12 lie within those of 24.

    Args:
        train: labelled items.
        count: number of items that stay labelled.
        seed: seed of the shuffle.

    Returns:
        Labelled items and unlabelled items (copies without "label"), each sorted by id.

    Raises:
        ValueError: `count` is not between 1 and the number of items, or no group is that small.
    """
    train = _sorted_by_id(train)
    if not 1 <= count <= len(train):
        raise ValueError(f"Cannot keep {count} of {len(train)} training items labelled: use 1 to {len(train)}.")
    sizes = Counter(item["group"] for item in train)
    kept: set[str] = set()
    room = count
    for group in _shuffled(sizes, seed):
        if sizes[group] <= room:
            kept.add(group)
            room -= sizes[group]
    if not kept:
        raise ValueError(
            f"Cannot keep {count} items labelled without cutting a group: the smallest group has "
            f"{min(sizes.values())} items."
        )
    labelled = [item for item in train if item["group"] in kept]
    unlabelled = [
        {key: value for key, value in item.items() if key != "label"} for item in train if item["group"] not in kept
    ]
    return labelled, unlabelled


def split_hash(
    train: Iterable[Item], validation: Iterable[Item], test: Iterable[Item], unlabelled: Iterable[Item]
) -> str:
    """SHA-256 of who is where: ids and groups per section, whatever the order, whatever the paths.

    Returns:
        64 hexadecimal digits.
    """
    sections = {"train": train, "validation": validation, "test": test, "unlabelled": unlabelled}
    members = {name: sorted([item["id"], item["group"]] for item in items) for name, items in sections.items()}
    return hashlib.sha256(json.dumps(members, sort_keys=True).encode()).hexdigest()


def _sorted_by_id(items: Iterable[Item]) -> list[Item]:
    """Sort items by id; an id that comes twice is refused."""
    ordered = sorted(items, key=lambda item: item["id"])
    for first, second in pairwise(ordered):
        if first["id"] == second["id"]:
            raise ValueError(f"The id '{first['id']}' comes twice in the datalist: ids must be unique.")
    return ordered


def _shuffled(groups: Iterable[str], seed: int) -> list[str]:
    """Shuffle group names; the result does not depend on the order they come in."""
    names = sorted(groups)
    return [names[index] for index in np.random.default_rng(seed).permutation(len(names))]


def _strata(items: Iterable[Item]) -> dict[str, str]:
    """The class of each group: the label where it is one, else the item's "class"; "" where there is neither."""
    return _majority(
        (i["group"], str(i["label"]) if isinstance(i.get("label"), int) else i.get("class", "")) for i in items
    )


def _majority(samples: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The most frequent class of each group, the first of equals; duplicates may have conflicting classes."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group, label in samples:
        counts[group][label] += 1
    return {group: min(found, key=lambda c: (-found[c], c)) for group, found in counts.items()}


def _items_per_stratum(sizes: Counter[str], strata: dict[str, str]) -> Counter[str]:
    count: Counter[str] = Counter()
    for group, size in sizes.items():
        count[strata[group]] += size
    return count


def _rarest_stratum_first(sizes: Counter[str], strata: dict[str, str], seed: int) -> list[str]:
    """Groups by stratum, the one with fewest items first, and within it the largest group first."""
    count = _items_per_stratum(sizes, strata)
    return sorted(_largest_first(sizes, seed), key=lambda group: (count[strata[group]], strata[group]))


def _largest_first(sizes: Counter[str], seed: int) -> list[str]:
    """Shuffle groups, then sort them by size, largest first (the sort keeps shuffled order among equals)."""
    return sorted(_shuffled(sizes, seed), key=lambda group: -sizes[group])
