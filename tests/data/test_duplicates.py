"""Near-duplicates found by their look: real copies, planted copies, no chance resemblance."""

import io
from itertools import combinations

import numpy as np
import pytest
from helpers import shared_data
from PIL import Image, ImageDraw, ImageEnhance

from amkd_monai.data import splits
from amkd_monai.data.phantoms import ultrasound_image
from amkd_monai.data.splits import (
    NEAR,
    clusters,
    joined,
    near_duplicates,
    near_pairs,
    perceptual_hashes,
)


@pytest.fixture(scope="module")
def pictures():
    return [
        Image.fromarray(ultrasound_image(np.random.default_rng(seed), (130, 200), 1, seed % 2 == 0)[0])
        for seed in range(6)
    ]


def with_calipers(picture):
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    draw.line((80, 60, 90, 60), fill=255, width=2)
    draw.text((5, 5), "RT BREAST 10", fill=255)
    return picture


def compressed(picture):
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=40)
    return Image.open(stream)


COPIES = {
    "calipers": with_calipers,
    "jpeg": compressed,
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "smaller": lambda picture: picture.resize((110, 90)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_others_are_not(pictures, tmp_path, kind):
    paths = []
    for index, picture in enumerate([*pictures, COPIES[kind](pictures[2])]):
        paths.append(str(tmp_path / f"{index}.png"))
        picture.save(paths[-1])
    assert near_duplicates([{"image": path} for path in paths]) == [(2, 6)]


def test_groups_are_named_after_their_members_and_keep_the_order(pictures, tmp_path):
    items = []
    for index, picture in enumerate([pictures[0], pictures[1], with_calipers(pictures[0])]):
        picture.save(tmp_path / f"{index}.png")
        items.append({"image": str(tmp_path / f"{index}.png"), "id": f"p{index}", "group": f"p{index}"})
    assert [item["group"] for item in joined(items, near_duplicates(items))] == ["p0+p2", "p1", "p0+p2"]
    assert [item["group"] for item in joined(items, near_duplicates(items, distance=0))] == ["p0", "p1", "p2"]


def test_pairs_agree_with_counting_bits():
    hashes = np.random.default_rng(0).random((700, 16)) < 0.5
    expected = [(i, j) for i, j in combinations(range(700), 2) if (hashes[i] != hashes[j]).sum() <= 1]
    assert len(expected) > 10
    assert sorted(near_pairs([np.packbits(bits).tobytes().hex() for bits in hashes], 1)) == expected
    assert near_pairs(["", ""]) == near_pairs([]) == []


def test_clusters_join_chains():
    assert clusters(6, [(4, 1), (1, 3), (5, 2)]) == [[0], [1, 3, 4], [2, 5]]
    assert clusters(2, []) == [[0], [1]]


def test_hashes_are_kept_by_content(pictures, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    pictures[0].save(path)
    first = perceptual_hashes([str(path)], tmp_path / "cache")
    path.rename(tmp_path / "moved.png")
    monkeypatch.setattr(splits, "_hash", lambda path: pytest.fail("decoded again"))
    assert perceptual_hashes([str(tmp_path / "moved.png")], tmp_path / "cache") == first
    monkeypatch.undo()
    pictures[1].save(tmp_path / "moved.png")
    other = perceptual_hashes([str(tmp_path / "moved.png")], tmp_path / "cache")
    assert first != other and near_pairs([*first, *other], NEAR) == []


@pytest.mark.parametrize("content", ["no json", '{"a": "b"}', "[]"])
def test_a_damaged_memo_is_built_again(pictures, tmp_path, content):
    pictures[0].save(tmp_path / "a.png")
    (tmp_path / "perceptual_hashes_16.json").write_text(content)
    kept = perceptual_hashes([str(tmp_path / "a.png")], tmp_path)
    assert (
        kept == perceptual_hashes([str(tmp_path / "a.png")]) == perceptual_hashes([str(tmp_path / "a.png")], tmp_path)
    )


def test_a_file_that_cannot_be_read_is_announced_and_alone(pictures, tmp_path, caplog):
    items = []
    for index in range(3):
        pictures[0].save(tmp_path / f"{index}.png")
        items.append({"image": str(tmp_path / f"{index}.png"), "id": f"p{index}", "group": f"p{index}"})
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-2000])
    grouped = joined(items, near_duplicates(items, cache_dir=tmp_path))
    assert [item["group"] for item in grouped] == ["p0+p2", "p1", "p0+p2"]
    assert "1.png cannot be read" in caplog.text


def test_real_copies_are_found():
    folder = shared_data("BUSI", "Dataset_BUSI_with_GT")
    names = [f"malignant ({n})" for n in (3, 4, 5, 7, 8, 9, 10)] + ["normal (41)", "normal (47)", "normal (36)"]
    items = [{"image": str(folder / name.split()[0] / f"{name}.png")} for name in names]
    found = {frozenset((names[i], names[j])) for i, j in near_duplicates(items)}
    assert found == {frozenset(f"malignant ({n})" for n in pair) for pair in ((4, 5), (7, 8), (7, 9), (8, 9))} | {
        frozenset(("normal (41)", "normal (47)"))
    }
