import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image
from toy_dataset import CountingTeacher, decoded, write_items

from amkd_monai.cache.build import answers_store, cache_teacher, images_of, keep_answers, to_device
from amkd_monai.cache.store import Part, StoreError


@pytest.fixture
def items(tmp_path):
    return write_items(tmp_path / "in", 12)


@pytest.fixture
def many(tmp_path):
    """More samples than two shards of 128 hold: slices of one picture under many names."""
    items = write_items(tmp_path / "in", 10)
    return [{**items[i % 10], "id": f"s{i}", "group": f"s{i}"} for i in range(300)]


def test_the_store_holds_what_the_teacher_says(items, tmp_path):
    dataset, teacher = decoded(items, tmp_path / "cache"), CountingTeacher(gives_logits=True)
    store = cache_teacher(teacher, dataset, tmp_path / "cache", batch_size=5)
    assert store.is_complete and len(store) == 12 and store.sample_ids == dataset.ids
    assert teacher.seen == 12
    with torch.inference_mode():
        said = teacher(images_of(dataset, range(12), "cpu"))
    order = [7, 0, 11, 7]
    for name in ("grid", "pooled", "logits"):
        expected = getattr(said, name)[order].numpy()
        np.testing.assert_allclose(store.read(name, order), expected, atol=2e-3)


def test_images_are_those_of_the_dataset(items, tmp_path):
    dataset = decoded(items, tmp_path / "cache")
    images = images_of(dataset, range(2, 4), "cpu")
    assert images.dtype == torch.float32 and images.shape == (2, 3, 16, 16)
    expected = np.asarray(Image.open(items[2]["image"])).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(images[0], expected, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copying_to_a_gpu_does_not_wait_for_it():
    values = np.random.default_rng(0).normal(size=(8, 64, 64)).astype(np.float16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copied = [to_device(values + i, "cuda") for i in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, tensor in enumerate(copied):
        np.testing.assert_array_equal(tensor.cpu().numpy(), values + i)


def test_a_second_call_computes_nothing(items, tmp_path):
    dataset = decoded(items, tmp_path / "cache")
    first = cache_teacher(CountingTeacher(), dataset, tmp_path / "cache")
    again = CountingTeacher()
    second = cache_teacher(again, decoded(items, tmp_path / "cache"), tmp_path / "cache")
    assert again.seen == 0
    assert second.directory == first.directory and second.is_complete
    np.testing.assert_array_equal(first.read("grid", range(12)), second.read("grid", range(12)))


def test_an_interrupted_run_goes_on_at_the_shard_it_had_reached(many, tmp_path):
    dataset = decoded(many, tmp_path / "cache")
    stopped = CountingTeacher(fails_after=200)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(stopped, dataset, tmp_path / "cache")
    resumed = CountingTeacher()
    store = cache_teacher(resumed, dataset, tmp_path / "cache")
    assert store.is_complete
    assert resumed.seen == 300 - 128  # one of three shards was done
    whole = cache_teacher(CountingTeacher(), dataset, tmp_path / "another")
    np.testing.assert_array_equal(store.read("grid", range(300)), whole.read("grid", range(300)))


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


def test_a_damaged_shard_alone_is_computed_again(many, tmp_path):
    """The first run that reads it is refused and removes it, the next one computes it."""
    dataset = decoded(many, tmp_path / "cache")
    store = cache_teacher(CountingTeacher(), dataset, tmp_path / "cache")
    expected = store.read("grid", range(300))
    flip_last_byte(store.path(0, 1))
    with pytest.raises(StoreError, match=f"{store.path(0, 1)} .*run again"):
        cache_teacher(CountingTeacher(), dataset, tmp_path / "cache").read("pooled", range(300))
    again = CountingTeacher()
    repaired = cache_teacher(again, dataset, tmp_path / "cache")
    assert again.seen == 128
    np.testing.assert_array_equal(repaired.read("grid", range(300)), expected)


def test_whatever_changes_the_features_has_a_store_of_its_own(items, tmp_path):
    cache = tmp_path / "cache"
    teachers = [CountingTeacher(), CountingTeacher(seed=1), CountingTeacher(name="other")]
    stores = [cache_teacher(t, decoded(items, cache), cache) for t in teachers]
    resized = CountingTeacher()
    resized.preprocessing = lambda: {"size": 8}
    stores.append(cache_teacher(resized, decoded(items, cache), cache))
    stores.append(cache_teacher(CountingTeacher(), decoded(items[:5], cache), cache))
    stores.append(cache_teacher(CountingTeacher(), decoded(items[::-1], cache), cache))
    Image.fromarray(np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)).save(items[0]["image"])
    changed = CountingTeacher()
    stores.append(cache_teacher(changed, decoded(items, cache), cache))
    assert changed.seen == 1  # the other images and the shapes are known
    assert len({s.directory for s in stores}) == len(stores)


def test_images_decoded_by_another_chain_are_other_images(items, tmp_path):
    """The files are the same and so is the size: only their intensities differ."""
    one = cache_teacher(CountingTeacher(), decoded(items, tmp_path), tmp_path)
    other = cache_teacher(CountingTeacher(), decoded(items, tmp_path, top=128.0), tmp_path)
    assert one.directory != other.directory
    assert np.abs(one.read("grid", range(12)) - other.read("grid", range(12))).max() > 0.01


def test_answers_that_are_not_finite_are_refused(items, tmp_path):
    teacher = CountingTeacher()
    teacher.network.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError) as error:
        cache_teacher(teacher, decoded(items, tmp_path), tmp_path)
    assert "00" in str(error.value) and "\n" not in str(error.value)


def test_a_teacher_is_run_without_gradient(items, tmp_path):
    teacher = CountingTeacher()
    teacher.network.requires_grad_(True)
    store = cache_teacher(teacher, decoded(items, tmp_path), tmp_path)
    assert store.is_complete and teacher.network.weight.grad is None


def test_answers_are_kept_once(items, tmp_path):
    dataset = decoded(items, tmp_path)
    logits = np.random.default_rng(0).normal(size=(12, 2, 4, 4)).astype(np.float32)
    store = answers_store("probe", {"folds": 5}, dataset, (4, 4), tmp_path)
    assert not store.is_complete
    keep_answers(store, logits)
    keep_answers(store, logits + 1)
    again = answers_store("probe", {"folds": 5}, dataset, (4, 4), tmp_path)
    assert again.is_complete
    np.testing.assert_allclose(again.read("logits", range(12)), logits, atol=2e-3)
    assert answers_store("probe", {"folds": 4}, dataset, (4, 4), tmp_path).directory != store.directory
    other = decoded(items, tmp_path, top=128.0)
    assert not answers_store("probe", {"folds": 5}, other, (4, 4), tmp_path).is_complete


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_only_new_images_are_computed_when_the_list_grows(items, tmp_path, dtype):
    """Another split, another order, more images: what is known of an image is taken over."""
    few, teacher = decoded(items[:7], tmp_path), CountingTeacher(gives_logits=True)
    cache_teacher(teacher, few, tmp_path, dtype=dtype)
    again = CountingTeacher(gives_logits=True)
    grown = cache_teacher(again, decoded(items[::-1], tmp_path), tmp_path, dtype=dtype)
    assert again.seen == 5 and grown.is_complete
    alone = cache_teacher(teacher, decoded(items[::-1], tmp_path), tmp_path / "alone", dtype=dtype)
    for name in ("grid", "pooled", "logits"):
        np.testing.assert_array_equal(grown.read(name, range(12)), alone.read(name, range(12)))


@pytest.mark.parametrize("change", ["weights", "preprocessing", "chain", "dtype"])
def test_nothing_is_taken_over_from_another_teacher_or_other_images(items, tmp_path, change):
    cache_teacher(CountingTeacher(), decoded(items[:7], tmp_path), tmp_path)
    teacher = CountingTeacher(seed=change == "weights")
    if change == "preprocessing":
        teacher.preprocessing = lambda: {"size": 8}
    dataset = decoded(items, tmp_path, top=128.0 if change == "chain" else 255.0)
    cache_teacher(teacher, dataset, tmp_path, dtype="int8" if change == "dtype" else "float16")
    assert teacher.seen == 12


def test_a_damaged_earlier_store_is_not_used(items, tmp_path, caplog):
    earlier = cache_teacher(CountingTeacher(), decoded(items[:7], tmp_path), tmp_path)
    (earlier.directory / "store.json").write_text("{")
    again = CountingTeacher()
    assert cache_teacher(again, decoded(items, tmp_path), tmp_path).is_complete
    assert again.seen == 12 and "no earlier store" in caplog.text and str(earlier.directory) in caplog.text


def test_a_damaged_shard_of_an_earlier_store_is_not_copied(items, tmp_path, caplog):
    earlier = cache_teacher(CountingTeacher(), decoded(items[:7], tmp_path), tmp_path)
    flip_last_byte(earlier.path(0, 0))
    again = CountingTeacher()
    store = cache_teacher(again, decoded(items, tmp_path), tmp_path)
    alone = cache_teacher(CountingTeacher(), decoded(items, tmp_path), tmp_path / "alone", batch_size=1)
    assert again.seen == 12 and str(earlier.path(0, 0)) in caplog.text
    np.testing.assert_allclose(store.read("grid", range(12)), alone.read("grid", range(12)), atol=2e-3)


def test_parts_build_one_store_side_by_side(many, tmp_path):
    dataset, whole = decoded(many, tmp_path), cache_teacher(CountingTeacher(), decoded(many, tmp_path), tmp_path / "w")
    seen = []
    for index in range(4):  # three shards: the last part has nothing to do
        teacher = CountingTeacher()
        store = cache_teacher(teacher, dataset, tmp_path, part=Part(index, 4))
        seen.append(teacher.seen)
        assert store.is_complete == (index >= 2)
    assert seen == [128, 128, 44, 0]
    np.testing.assert_array_equal(store.read("grid", range(300)), whole.read("grid", range(300)))
    assert {p.name: p.read_bytes() for p in store.directory.glob("v*")} == {
        p.name: p.read_bytes() for p in whole.directory.glob("v*")
    }


def test_the_part_of_a_process(monkeypatch):
    assert Part.parse("3/8") == Part(2, 8) and Part.parse() == Part(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Part.parse() == Part(3, 4)
    for wrong in ("0/8", "9/8", "3", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="is invalid"):
            Part.parse(wrong)


def test_a_complete_cache_is_used_from_a_disk_that_cannot_be_written(items, tmp_path, monkeypatch):
    cache_teacher(CountingTeacher(), decoded(items, tmp_path), tmp_path)

    def refuse(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os_open(path, flags, *arguments, **options)

    os_open = os.open
    monkeypatch.setattr(os, "open", refuse)
    teacher = CountingTeacher()
    assert cache_teacher(teacher, decoded(items, tmp_path), tmp_path).is_complete and teacher.seen == 0
    with pytest.raises(PermissionError, match=r"cannot write .*: the folder is not writable"):
        cache_teacher(CountingTeacher(seed=1), decoded(items, tmp_path), tmp_path)


def test_a_full_disk_ends_building_in_one_sentence_and_what_is_there_is_kept(many, tmp_path, monkeypatch):
    dataset, real_replace = decoded(many, tmp_path), os.replace

    def full(source, target):
        if "s00001" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk is full; free some space") as caught:
        cache_teacher(CountingTeacher(), dataset, tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    again = CountingTeacher()
    assert cache_teacher(again, dataset, tmp_path).is_complete and again.seen == 300 - 128
