"""Images that come twice: byte for byte, or nearly (with calipers, other brightness, another size or compression)."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from amkd_monai.atomic import atomic_write_json
from amkd_monai.content import content_hashes, file_sha256, read_memo
from amkd_monai.data.splits import Item
from amkd_monai.files.pictures import opened, to_rgb, upright
from amkd_monai.terminal import progress

logger = logging.getLogger("amkd_monai")

HASH_SIZE = 16
"""Side of the hash: 256 bits."""

NEAR = 32
"""Bits in which near-duplicates differ at most. Measured on the data sets named in the project: copies with calipers,
text, other brightness or JPEG quality differ by up to 28 bits, different pictures of one kind by 36 or more."""


def group_identical_images(items: Iterable[Item]) -> list[Item]:
    """Give byte-identical images one common group, their ids joined by "+"; return copies of the items, sorted by id.

    Only files of equal size are read, so this costs one `stat` per image on a data set without duplicates.
    """
    ordered = sorted(items, key=lambda item: item["id"])
    sizes = [Path(item["image"]).stat().st_size for item in ordered]
    shared = Counter(sizes)
    contents = [
        (size, file_sha256(item["image"]) if shared[size] > 1 else item["id"])
        for size, item in zip(sizes, ordered, strict=True)
    ]
    ids = defaultdict(list)
    for item, content in zip(ordered, contents, strict=True):
        ids[content].append(item["id"])
    return [{**item, "group": "+".join(ids[content])} for item, content in zip(ordered, contents, strict=True)]


def perceptual_hashes(paths: Sequence[str], cache_dir: str | Path | None = None) -> tuple[np.ndarray, list[int]]:
    """Hash pictures by their coarse look (`imagehash.phash`).

    Args:
        paths: picture files.
        cache_dir: folder that keeps the hashes by content, so that a picture is decoded once; None keeps nothing.

    Returns:
        Boolean array (M, 256) and the indices of the M paths; files that cannot be read are announced and left out.
    """
    memo = None if cache_dir is None else Path(cache_dir) / f"perceptual_hashes_{HASH_SIZE}.json"
    contents = content_hashes(paths, None if cache_dir is None else Path(cache_dir) / "content_hashes.json")
    known = {} if memo is None else read_memo(memo, lambda v: isinstance(v, str) and len(v) == HASH_SIZE**2 // 4)
    missing = {content: path for content, path in zip(contents, paths, strict=True) if content not in known}
    for content, path in progress(missing.items(), desc="compare images", delay=1):
        try:
            known[content] = _hash(path)
        except (OSError, SyntaxError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and is compared with no other image", path, error)
    if memo is not None and missing.keys() & known.keys():
        atomic_write_json(memo, known, indent=None)
    readable = [index for index, content in enumerate(contents) if content in known]
    packed = np.array([list(bytes.fromhex(known[contents[index]])) for index in readable], dtype=np.uint8)
    return np.unpackbits(packed.reshape(len(readable), HASH_SIZE**2 // 8), axis=1).astype(bool), readable


def _hash(path: str) -> str:
    import imagehash

    with opened(path) as image:
        image.draft("L", (8 * HASH_SIZE, 8 * HASH_SIZE))
        shown = upright(image)
    grey = (to_rgb(shown) if shown.mode[0] in "IF" else shown).convert("L")
    return str(imagehash.phash(grey, hash_size=HASH_SIZE))


def near_duplicates(
    paths: Sequence[str], distance: int = NEAR, cache_dir: str | Path | None = None
) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of pictures whose hashes differ in at most ``distance`` bits."""
    hashes, indices = perceptual_hashes(paths, cache_dir)
    return [(indices[i], indices[j]) for i, j in near_pairs(hashes, distance)]


def near_pairs(hashes: np.ndarray, distance: int = NEAR) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of hashes (N, bits) that differ in at most ``distance`` bits."""
    signs = hashes.astype(np.float32) * 2 - 1
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(signs), 512):
        differing = (hashes.shape[1] - signs[start : start + 512] @ signs.T) / 2  # (rows, N)
        rows, columns = np.nonzero(differing <= distance + 0.5)
        pairs += [(int(i) + start, int(j)) for i, j in zip(rows, columns, strict=True) if i + start < j]
    return pairs


def clusters(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Join pairs to clusters: indices 0 to ``count`` - 1, each in one sorted cluster, clusters sorted."""
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    links = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    members = defaultdict(list)
    for index, label in enumerate(connected_components(links, directed=False)[1]):
        members[label].append(index)
    return sorted(members.values())


def group_near_duplicates(
    items: Sequence[Item], distance: int = NEAR, cache_dir: str | Path | None = None
) -> list[Item]:
    """Give near-duplicate pictures one common group, the ids joined by "+"; return copies of the items in their order.

    Args:
        items: items with pictures.
        distance: bits in which two hashes of one group differ at most; 0 joins equal hashes only.
        cache_dir: see :func:`perceptual_hashes`.
    """
    pairs = near_duplicates([item["image"] for item in items], distance, cache_dir)
    grouped = list(items)
    for members in clusters(len(items), pairs):
        name = "+".join(sorted(items[index]["id"] for index in members))
        for index in members:
            grouped[index] = {**items[index], "group": name}
    return grouped
