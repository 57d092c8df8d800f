import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import CenterSpatialCropd, Compose
from PIL import Image
from test_describe import nested_chain
from toy_images import photo_chain, volume_chain, write_photo, write_volume

from amkd_monai.data.decoded import UNLABELLED, BadSampleError, DecodedDataset, describe
from amkd_monai.files.names import DataProblems


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "in").mkdir()
    return [write_photo(tmp_path / "in", f"p{i}", seed=i, label=i != 2) for i in range(3)]


def decode(items, tmp_path, **options):
    return DecodedDataset(items, options.pop("chain", None) or photo_chain(), tmp_path / "cache", **options)


def assert_bad(error, path, *words):
    text = str(error.value)
    assert str(path) in text and "\n" not in text and text.endswith("."), text
    for word in words:
        assert word in text, text


def content_of(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(Path(folder).iterdir())}


def test_photos_are_kept_as_they_are(photos, tmp_path):
    dataset = decode(photos, tmp_path)
    assert len(dataset) == 3 and dataset.ids == dataset.cases == ["p0", "p1", "p2"]
    assert dataset.groups == [f"patient of p{i}" for i in range(3)]
    assert dataset.has_label.tolist() == [True, True, False] == dataset.has_foreground.tolist()
    for i, item in enumerate(photos):
        expected = np.asarray(Image.open(item["image"])).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
        sample = dataset[i]
        assert sample["image"].shape == (3, 24, 40) and sample["image"].dtype == torch.uint8
        np.testing.assert_array_equal(sample["image"], expected)
        assert sample["id"] == item["id"] and sample["index"] == i and sample["has_label"] == (i != 2)
    expected = np.zeros((1, 24, 40))
    expected[0, :12, :10] = 1
    np.testing.assert_array_equal(dataset[0]["label"], expected)
    assert (dataset[2]["label"] == UNLABELLED).all()


def test_photos_of_another_shape_are_resized(tmp_path):
    items = [write_photo(tmp_path, "wide", (20, 60)), write_photo(tmp_path, "high", (60, 20))]
    dataset = decode(items, tmp_path, chain=photo_chain((16, 32)))
    assert dataset.images.shape == (2, 3, 16, 32) and dataset.labels.shape == (2, 1, 16, 32)
    assert (dataset.labels[:, 0, :7, :7] == 1).all() and (dataset.labels[:, 0, 9:] == 0).all()


@pytest.mark.parametrize("own", [False, True])
def test_volumes_become_slices_with_their_neighbours(tmp_path, own):
    items = [write_volume(tmp_path, "v"), write_volume(tmp_path, "w", (3, 10, 14), seed=50, label=False)]
    dataset = decode(items, tmp_path, chain=volume_chain(own))
    assert dataset.ids == [f"v#{i:03d}" for i in range(4)] + [f"w#{i:03d}" for i in range(3)]
    assert dataset.cases == ["v"] * 4 + ["w"] * 3 == dataset.groups
    levels = [dataset.image(i)[:, 0, 0].tolist() for i in range(7)]
    at = [round(v / 100 * 255) for v in (0, 10, 20, 30, 50, 60, 70)]
    assert levels == [
        [at[0], at[0], at[1]],
        [at[0], at[1], at[2]],
        [at[1], at[2], at[3]],
        [at[2], at[3], at[3]],  # the last slice is its own neighbour: the next volume is not looked at
        [at[4], at[4], at[5]],
        [at[4], at[5], at[6]],
        [at[5], at[6], at[6]],
    ]
    assert dataset.has_label.tolist() == [True] * 4 + [False] * 3
    assert dataset.has_foreground.tolist() == [False, True] + [False] * 5
    assert dataset[1]["label"].sum() == 18 and dataset[0]["image"].shape == (3, 10, 14)


def test_a_second_construction_decodes_nothing(photos, tmp_path):
    first = decode(photos, tmp_path)
    before = content_of(first.directory)
    calls = []

    class Counting(type(photo_chain())):
        def __call__(self, *args, **kwargs):
            calls.append(args)
            return super().__call__(*args, **kwargs)

    again = decode(photos, tmp_path)
    assert again.directory == first.directory and content_of(first.directory) == before
    np.testing.assert_array_equal(again.images, first.images)
    counting = Counting(photo_chain().transforms)
    decode(photos, tmp_path, chain=counting)
    assert len(calls) == 3
    decode(photos, tmp_path, chain=Counting(photo_chain().transforms))
    assert len(calls) == 3


def test_what_matters_gets_a_folder_of_its_own(photos, tmp_path):
    folders = [decode(photos, tmp_path).directory]
    folders.append(decode(photos, tmp_path, chain=photo_chain(image_mode="nearest")).directory)
    folders.append(decode(photos, tmp_path, num_classes=3).directory)
    folders.append(decode(photos[:2], tmp_path).directory)
    folders.append(decode([{k: v for k, v in photos[0].items() if k != "label"}, *photos[1:]], tmp_path).directory)
    folders.append(decode([{**photos[0], "group": "other"}, *photos[1:]], tmp_path).directory)
    write_photo(tmp_path / "in", "p1", seed=99)
    folders.append(decode(photos, tmp_path).directory)
    mask = np.asarray(Image.open(photos[0]["label"])).copy()
    mask[-1, -1] = 255
    Image.fromarray(mask).save(photos[0]["label"])
    folders.append(decode(photos, tmp_path).directory)
    assert len(set(folders)) == len(folders) and all((f / "index.json").is_file() for f in folders)


def test_content_hashes_tell_images_apart(photos, tmp_path):
    dataset = decode(photos, tmp_path)
    assert len(set(dataset.hashes)) == 3
    changed = decode([photos[0], {**photos[1], "label": photos[0]["label"]}, photos[2]], tmp_path)
    assert changed.hashes == dataset.hashes  # the masks are byte-identical


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_corrupt_png_is_named(photos, tmp_path, key, damage):
    path = Path(photos[1][key])
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an image"}[damage])
    with pytest.raises(BadSampleError) as error:
        decode(photos, tmp_path)
    assert_bad(error, path, "replace")


@pytest.mark.parametrize("key", ["image", "label"])
def test_a_missing_file_is_named(photos, tmp_path, key):
    Path(photos[1][key]).unlink()
    with pytest.raises((BadSampleError, FileNotFoundError)) as error:
        decode(photos, tmp_path)
    assert photos[1][key] in str(error.value)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("keep", [0, 0.1, 0.6])
def test_a_truncated_volume_is_named(tmp_path, keep, own):
    noise = np.random.default_rng(0).uniform(0, 100, (4, 10, 14))
    items = [write_volume(tmp_path, "v"), write_volume(tmp_path, "w", values=noise)]
    path = Path(items[1]["image"])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(BadSampleError) as error:
        decode(items, tmp_path, chain=volume_chain(own))
    assert_bad(error, path, "replace")


@pytest.mark.parametrize("own", [False, True])
def test_a_volume_whose_data_end_early_is_named(tmp_path, own):
    items = [write_volume(tmp_path, "v", values=np.random.default_rng(0).uniform(0, 100, (4, 10, 14)))]
    path = Path(items[0]["image"])
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-700]))
    with pytest.raises(BadSampleError) as error:
        decode(items, tmp_path, chain=volume_chain(own))
    assert_bad(error, path)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_volume_with_values_that_are_not_finite_is_named(tmp_path, value, own):
    values = np.random.default_rng(0).uniform(0, 100, (4, 10, 14))
    values[2, 3, 4] = value
    chain = volume_chain(own)
    if np.isinf(value):  # clipping would hide it
        chain.transforms = chain.transforms[:-1]
    with pytest.raises(BadSampleError) as error:
        decode([write_volume(tmp_path, "v", values=values)], tmp_path, chain=chain)
    assert_bad(error, tmp_path / "v.nii.gz", "not finite")


def test_a_mask_of_another_size_is_named(tmp_path):
    item = write_volume(tmp_path, "v")
    mask = nibabel.Nifti1Image(np.zeros((4, 10, 15), np.uint8), np.eye(4))
    nibabel.save(mask, item["label"])
    with pytest.raises(BadSampleError) as error:
        decode([item], tmp_path, chain=volume_chain())
    assert_bad(error, item["label"], "(10, 15)", "(10, 14)")
    with pytest.raises(BadSampleError) as error:
        decode([item], tmp_path, chain=volume_chain(own=True))
    assert_bad(error, item["label"], "15 voxels")


@pytest.mark.parametrize("value", [2, 254, -1, 0.5, np.nan])
def test_a_label_that_is_no_class_is_named(tmp_path, value):
    item = write_volume(tmp_path, "v")
    mask = np.zeros((4, 10, 14), np.float32)
    mask[1, 2, 3], mask[1, 2, 4] = value, 1
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), item["label"])
    with pytest.raises(BadSampleError) as error:
        decode([item], tmp_path, chain=volume_chain())
    assert_bad(error, item["label"], f"{value:g}", "0 to 1", "correct")
    with pytest.raises(BadSampleError) as error:
        decode([item], tmp_path, chain=volume_chain(own=True))
    assert_bad(error, item["label"], "cannot be used")


@pytest.mark.parametrize("own", [False, True])
def test_255_in_a_label_of_classes_is_no_label(tmp_path, own):
    item = write_volume(tmp_path, "v")
    mask = np.asarray(nibabel.load(item["label"]).dataobj).copy()
    mask[3] = 255
    mask[1, 0, 0] = 255
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), item["label"])
    dataset = decode([item], tmp_path, chain=volume_chain(own))
    np.testing.assert_array_equal(dataset.labels[:, 0], mask)
    assert dataset.has_foreground.tolist() == [False, True, False, False]


def test_pictures_of_16_bits_that_have_another_white_are_named(photos, tmp_path):
    """By itself each is read on the smallest scale that holds it: 12 bits, but for the brightest."""
    for item, highest in zip(photos, (4000, 5000, 3000), strict=True):
        values = np.random.default_rng(0).integers(0, highest, (24, 40)).astype(np.uint16)
        Image.fromarray(values).save(item["image"])
    assert len(decode(photos[::2], tmp_path).ids) == 2
    with pytest.raises(BadSampleError) as error:
        decode(photos, tmp_path)
    assert_bad(error, photos[1]["image"], "4095", "65535")
    assert decode(photos, tmp_path, on_bad_sample="skip").skipped == ["p1"]


def test_items_with_problems_are_told_at_once_or_skipped(photos, tmp_path):
    for i in (0, 2):
        photos[i]["problem"] = f"{photos[i]['image']} is broken in way {i}."
    with pytest.raises(DataProblems, match=r"p0\.png is broken in way 0\..*1 more problem") as error:
        decode(photos, tmp_path)
    assert [photos[i]["problem"] for i in (0, 2)] == error.value.problems
    dataset = decode(photos, tmp_path, on_bad_sample="skip")
    assert dataset.skipped == ["p0", "p2"] and dataset.ids == ["p1"]


@pytest.mark.parametrize("values", [np.zeros((4, 10, 14)), np.repeat([0.0, 30.0, 60.0, 90.0], 140).reshape(4, 10, 14)])
def test_a_volume_of_almost_no_levels_is_named(tmp_path, values):
    items = [write_volume(tmp_path, "v"), write_volume(tmp_path, "w", values=values)]
    with pytest.raises(BadSampleError) as error:
        decode(items, tmp_path, chain=volume_chain(own=True))
    assert_bad(error, items[1]["image"], f"{len(np.unique(values))} of 256 levels")
    assert decode(items, tmp_path, chain=volume_chain(own=True), on_bad_sample="skip").skipped == ["w"]


@pytest.mark.parametrize(("size", "cut"), [((-1, 4, 14), True), ((-1, 6, 8), False), ((-1, 6, 7), True)])
def test_foreground_that_a_crop_cuts_off_is_said(tmp_path, caplog, size, cut):
    items = [write_volume(tmp_path, "v"), write_volume(tmp_path, "w", seed=50, label=False)]
    crop = CenterSpatialCropd(["image", "label"], size, allow_missing_keys=True)
    dataset = decode(items, tmp_path, chain=Compose([*volume_chain(True).transforms, crop]))
    assert (int(dataset.labels[:4].sum()) < 18) == cut
    named = [r.getMessage() for r in caplog.records if "student sees" in r.getMessage()]
    assert any("w.nii.gz" in words for words in named)
    assert any("foreground" in words and "v.nii.gz" in words for words in named) == cut == (len(named) == 2)


def test_images_of_different_sizes_are_named(tmp_path):
    items = [write_volume(tmp_path, "v"), write_volume(tmp_path, "w", (4, 12, 14))]
    with pytest.raises(BadSampleError) as error:
        decode(items, tmp_path, chain=volume_chain())
    assert_bad(error, items[1]["image"], "(12, 14)", "(10, 14)")


def test_skipping_lists_the_bad_sample_and_keeps_the_others(photos, tmp_path, caplog):
    Path(photos[1]["image"]).write_bytes(b"broken")
    dataset = decode(photos, tmp_path, on_bad_sample="skip")
    assert dataset.skipped == ["p1"] and dataset.ids == ["p0", "p2"] and len(dataset.images) == 2
    assert any(photos[1]["image"] in record.message for record in caplog.records)
    assert decode(photos, tmp_path, on_bad_sample="skip").skipped == ["p1"]
    with pytest.raises(BadSampleError):  # what was skipped once is not forgiven elsewhere
        decode(photos, tmp_path)


def test_skipping_keeps_the_neighbours_of_volumes_apart(tmp_path):
    items = [write_volume(tmp_path, n, seed=s) for n, s in (("u", 0), ("v", 1), ("w", 50))]
    Path(items[1]["image"]).write_bytes(b"broken")
    dataset = decode(items, tmp_path, chain=volume_chain(), on_bad_sample="skip")
    assert dataset.cases == ["u"] * 4 + ["w"] * 4
    assert dataset.image(4)[:, 0, 0].tolist() == [128, 128, 153]


def test_nothing_left_and_wrong_options_are_named(photos, tmp_path):
    for item in photos:
        Path(item["image"]).write_bytes(b"broken")
    with pytest.raises(BadSampleError, match="No usable image"):
        decode(photos, tmp_path, on_bad_sample="skip")
    with pytest.raises(ValueError, match="empty"):
        decode([], tmp_path)
    with pytest.raises(ValueError, match="'ignore'"):
        decode(photos, tmp_path, on_bad_sample="ignore")


def test_a_failed_decode_leaves_earlier_folders_intact_and_can_be_repeated(photos, tmp_path):
    good = decode(photos, tmp_path)
    before = content_of(good.directory)
    path = Path(photos[1]["image"])
    content = path.read_bytes()
    path.write_bytes(content[:50])
    for _ in range(2):
        with pytest.raises(BadSampleError):
            decode(photos, tmp_path)
    assert content_of(good.directory) == before
    path.write_bytes(content)
    assert decode(photos, tmp_path).directory == good.directory


def test_a_half_written_folder_is_decoded_again(photos, tmp_path):
    good = decode(photos, tmp_path)
    images = np.array(good.images)
    (good.directory / "index.json").unlink()
    (good.directory / "images.u8").write_bytes(b"half")
    np.testing.assert_array_equal(decode(photos, tmp_path).images, images)
    shutil.rmtree(good.directory)
    np.testing.assert_array_equal(decode(photos, tmp_path).images, images)


OTHER_PROCESS = """
import json, pickle, sys, torch
from test_describe import nested_chain
from amkd_monai.data.decoded import describe
loader = torch.utils.data.DataLoader(pickle.load(open(sys.argv[1], "rb")), batch_size=3, num_workers=1)
batch = next(iter(loader))
print(tuple(batch["image"].shape), batch["id"], batch["has_label"].tolist(), batch["index"].tolist())
print(json.dumps(describe(nested_chain())))
"""


def test_another_process_loads_it_in_batches_by_workers_and_describes_its_chain_alike(photos, tmp_path):
    """In a process of its own: SIGCHLD of the worker has killed a test process with 60 threads of other libraries."""
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(decode(photos, tmp_path)))
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1])])
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "dataset.pkl")]
    loaded, described = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout.splitlines()
    assert loaded == "(3, 3, 24, 40) ['p0', 'p1', 'p2'] [True, True, False] [0, 1, 2]"
    assert described == json.dumps(describe(nested_chain()))
