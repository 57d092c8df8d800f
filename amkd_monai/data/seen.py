"""Images a student has seen: fingerprints of its training and validation images, and the search for copies."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from amkd_monai.data.datalist import Datalist
from amkd_monai.data.splits import Item, near_pairs, perceptual_hashes
from amkd_monai.files.cases import read_case
from amkd_monai.files.names import files_of
from amkd_monai.files.volumes import reorder
from amkd_monai.storage import content_hashes, fingerprint, read_memo, write_memo

Seen = dict[str, list[str]]
"""By section and id, ``train/<id>``: the fingerprint of an image, and of a picture its perceptual hash."""


def fingerprints(sections: Mapping[str, Sequence[Item]], volumes: bool, cache_dir: str | Path | None = None) -> Seen:
    """Describe the images of sections by name; missing files are left out.

    The fingerprint of a picture is that of its file, of a volume that of its values in anatomical order, so that a copy
    that is packed or turned otherwise is the same. ``cache_dir`` keeps what has been computed, by the content of files.
    """
    items = {f"{name}/{i['id']}": files_of(i["image"])[0] for name, part in sections.items() for i in part}
    paths = {name: path for name, path in items.items() if Path(path).exists()}
    contents = content_hashes(list(paths.values()), cache_dir)
    if volumes:
        memo = None if cache_dir is None else Path(cache_dir) / "volume_hashes.json"
        known = read_memo(memo, lambda value: isinstance(value, str))
        for content, path in zip(contents, paths.values(), strict=True):
            if content not in known:
                known[content] = _of_values(path) or content
        write_memo(memo, known)
        return {name: [known[content]] for name, content in zip(paths, contents, strict=True)}
    looks = perceptual_hashes(list(paths.values()), cache_dir)
    return {name: [*filter(None, of)] for name, *of in zip(paths, contents, looks, strict=True)}


def _of_values(path: str) -> str:
    """Fingerprint of the values of a volume; empty where it cannot be read, so that its file stands for it."""
    try:
        channels, grid = read_case([path])
    except (ValueError, OSError):
        return ""
    turned = np.concatenate([reorder(array, grid, "RAS") for array in channels])
    return fingerprint(turned.shape, hashlib.sha256(turned.tobytes()).hexdigest())


def seen_before(
    known: Mapping[str, Sequence[str]], data: Datalist, how: str, cache_dir: str | Path | None = None
) -> dict[str, str]:
    """Say of each test item that a student has seen, by id, which of its images it is or looks like.

    ``known`` are the :func:`fingerprints` of the student; pictures look alike where their hashes differ in at most
    :data:`~amkd_monai.data.splits.NEAR` bits. Unless ``how`` is ``apart`` such items are a ValueError.
    """
    own = fingerprints({"": data.test}, data.task.dimensions == 3, cache_dir)
    first = {values[0]: name for name, values in reversed(list(known.items()))}
    found = {name[1:]: f"is {first[values[0]]}" for name, values in own.items() if values[0] in first}
    hashed = [(name, values[1]) for part in (known, own) for name, values in part.items() if len(values) > 1]
    count = sum(len(values) > 1 for values in known.values())
    if 0 < count < len(hashed):
        for i, j in near_pairs([text for _, text in hashed]):
            if i < count <= j:
                found.setdefault(hashed[j][0][1:], f"looks like {hashed[i][0]}")
    if found and how != "apart":
        name, what = min(found.items())
        part = f"{len(found)} of {len(data.test)} images in {data.root} took part in the student's training"
        raise ValueError(f"{part}, such as {name}, which {what}: take them out, or report them by --seen apart.")
    return found
