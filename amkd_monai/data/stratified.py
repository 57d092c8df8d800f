"""Folds with about equal shares of every class that cut no group."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from amkd_monai.data.splits import Item, Sections


def stratified_k_fold(
    items: Iterable[Item],
    key: Callable[[Item], str],
    folds: int = 5,
    fold: int = 0,
    validation_fraction: float = 0.15,
    seed: int = 0,
) -> Sections:
    """Cross-validation split: test is one fold, validation a part of the rest; whole groups, classes in proportion.

    Args:
        items: items with "id" and "group".
        key: the class of an item.
        folds: number of folds, at least 2.
        fold: index of the fold that becomes the test section.
        validation_fraction: share of the items outside the fold that is used for validation.
        seed: seed of the order in which groups of one size are dealt out.

    Returns:
        Train, validation and test items, each sorted by id.

    Raises:
        ValueError: no such fold, a fraction not between 0 and 1, or fewer groups than sections or folds.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"The validation fraction {validation_fraction} must lie between 0 and 1.")
    if not 0 <= fold < folds:
        raise ValueError(f"There is no fold {fold}: choose one from 0 to {folds - 1}.")
    ordered = sorted(items, key=lambda item: item["id"])
    parts = stratified_parts(ordered, key, [1 / folds] * folds, seed)
    test = [item for item, part in zip(ordered, parts, strict=True) if part == fold]
    rest = [item for item, part in zip(ordered, parts, strict=True) if part != fold]
    inner = stratified_parts(rest, key, [1 - validation_fraction, validation_fraction], seed)
    train, validation = ([item for item, part in zip(rest, inner, strict=True) if part == index] for index in (0, 1))
    return train, validation, test


def stratified_parts(
    items: Sequence[Item], key: Callable[[Item], str], shares: Sequence[float], seed: int = 0
) -> list[int]:
    """Deal whole groups out to parts so that each part gets about its share of every class.

    Groups go, largest first, to the part that misses most items of the group's classes; rare classes come first.

    Args:
        items: items with "id" and "group".
        key: the class of an item.
        shares: share of the items per part, with the sum 1, each above 0.
        seed: seed of the order of groups of one size.

    Returns:
        The part of each item.

    Raises:
        ValueError: fewer than 2 parts, or fewer groups than parts.
    """
    members: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        members[item["group"]][key(item)] += 1
    if len(shares) < 2 or len(members) < len(shares):
        raise ValueError(
            f"{len(members)} group(s) cannot fill {len(shares)} part(s): use 2 parts or more, fewer folds."
        )
    totals = Counter(key(item) for item in items)
    missing = [{name: share * total for name, total in totals.items()} for share in shares]
    names = sorted(members)
    order = np.random.default_rng(seed).permutation(len(names))
    rarity = {group: min(totals[name] for name in counts) for group, counts in members.items()}
    ranked = sorted(order, key=lambda i: (-sum(members[names[i]].values()), rarity[names[i]]))
    part_of: dict[str, int] = {}
    empty = set(range(len(shares)))
    for done, index in enumerate(ranked):
        counts = members[names[index]]
        allowed = sorted(empty) if len(ranked) - done <= len(empty) else range(len(shares))
        part = max(
            allowed,
            key=lambda p: (
                sum(missing[p][name] * count for name, count in counts.items()),
                sum(missing[p].values()),
            ),
        )
        part_of[names[index]] = part
        empty.discard(part)
        for name, count in counts.items():
            missing[part][name] -= count
    return [part_of[item["group"]] for item in items]
