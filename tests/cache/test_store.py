import json
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from amkd_monai.cache.store import ArraySpec, FeatureStore, StoreError, shard_bytes, store_directory
from amkd_monai.storage import fingerprint

N = 11
KEY = {"teacher": "vit-abc", "preprocessing": {"size": [224, 224]}}
ARRAYS = {"grid": ArraySpec((6, 5, 4)), "pooled": ArraySpec((6,), "float32"), "codes": ArraySpec((6, 5, 4), "int8")}


def open_store(directory, **changes):
    arguments = {
        "key": KEY,
        "sample_ids": [f"case_{i:02d}" for i in range(N)],
        "content_hashes": [fingerprint(i) for i in range(N)],
        "arrays": ARRAYS,
        "views": 2,
        "shard_size": 4,
    }
    return FeatureStore.create_or_open(directory, **{**arguments, **changes})


def features(view, indices):
    """Values that depend on the view and the sample; channels differ in size by a factor of a hundred."""
    values = {name: [] for name in ARRAYS}
    for index in indices:
        rng = np.random.default_rng([view, index])
        grid = rng.normal(size=(6, 5, 4)) * np.geomspace(0.1, 10, 6)[:, None, None]
        values["grid"].append(grid)
        values["codes"].append(grid)
        values["pooled"].append(grid.mean(axis=(1, 2)))
    return {name: np.asarray(rows, np.float32) for name, rows in values.items()}


def build(store):
    with store.building():
        for view, shard in store.missing():
            store.write_shard(view, shard, features(view, store.samples_of(shard)))
    return store


def test_float_arrays_come_back_as_stored_by_random_index_over_shard_borders(tmp_path):
    store = open_store(build(open_store(tmp_path)).directory)
    assert store.is_complete and len(store) == N
    indices = np.random.default_rng(0).integers(0, N, size=40)
    for view in range(2):
        expected = features(view, indices)
        grid = store.read("grid", indices, view=view)
        assert grid.dtype == np.float16 and grid.shape == (40, 6, 5, 4)
        np.testing.assert_array_equal(grid, expected["grid"].astype(np.float16))
        pooled = store.read("pooled", indices.tolist(), view=view)
        assert pooled.dtype == np.float32
        np.testing.assert_array_equal(pooled, expected["pooled"])


def test_views_differ(tmp_path):
    store = build(open_store(tmp_path, view_parameters=[{"name": "identity"}, {"name": "hflip"}]))
    assert not np.array_equal(store.read("grid", range(N), 0), store.read("grid", range(N), 1))
    assert store.view_parameters[1] == {"name": "hflip"}


def test_int8_is_scaled_per_channel(tmp_path):
    store = build(open_store(tmp_path))
    read = store.read("codes", range(N))
    expected = features(0, range(N))["codes"]
    assert read.dtype == np.float32
    step = np.abs(expected).max(axis=(2, 3), keepdims=True) / 127
    assert (np.abs(read - expected) <= 0.5001 * step).all()
    a, b = read.reshape(N * 6, -1), expected.reshape(N * 6, -1)  # cosine of every single channel
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.999


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38, -3e38])
def test_int8_of_extreme_channels_is_finite(tmp_path, value):
    store = open_store(tmp_path, arrays={"codes": ArraySpec((1, 2), "int8")}, views=1, shard_size=N)
    with store.building():
        store.write_shard(0, 0, {"codes": np.full((N, 1, 2), value, np.float32)})
    np.testing.assert_allclose(store.read("codes", [3]), np.full((1, 1, 2), np.float32(value)), rtol=1e-6, atol=1e-43)


def test_scalar_arrays_and_empty_reads(tmp_path):
    store = open_store(tmp_path, arrays={"score": ArraySpec((), "float32")}, views=1)
    with store.building():
        for view, shard in store.missing():
            store.write_shard(view, shard, {"score": np.asarray(store.samples_of(shard), np.float32)})
    assert store.read("score", [10, 0, 5]).tolist() == [10, 0, 5]
    assert store.read("score", []).shape == (0,)


def test_missing_shrinks_and_the_last_shard_is_short(tmp_path):
    store = open_store(tmp_path)
    assert store.missing() == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [len(store.samples_of(shard)) for shard in range(3)] == [4, 4, 3]
    with store.building():
        store.write_shard(0, 2, features(0, store.samples_of(2)))
    assert (0, 2) not in open_store(tmp_path).missing() and not store.is_complete
    np.testing.assert_array_equal(store.read("pooled", [9]), features(0, [9])["pooled"])


def test_nothing_is_written_before_building(tmp_path):
    open_store(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_reading_outside_the_store_is_refused(tmp_path):
    store = open_store(tmp_path)
    store.write_shard(0, 0, features(0, range(4)))
    for indices, view in [([N], 0), ([-1], 0), ([0], 2), ([0], -1)]:
        with pytest.raises(IndexError, match="has no"):
            store.read("grid", indices, view=view)
    with pytest.raises(KeyError, match="no array 'logits', only grid, pooled, codes"):
        store.read("logits", [0])
    with pytest.raises(StoreError, match="view 0 shard 1 is not computed yet"):
        store.read("grid", [3, 4])
    with pytest.raises(IndexError, match="no shard 3"):
        store.samples_of(3)


@pytest.mark.parametrize("array", list(ARRAYS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_the_sample(tmp_path, array, value):
    store = open_store(tmp_path)
    values = features(0, range(4, 8))
    values[array][2].flat[1] = value
    with pytest.raises(ValueError, match=f"array '{array}' of sample 'case_06' holds NaN or inf"):
        store.write_shard(0, 1, values)
    assert (0, 1) in store.missing() and not list(tmp_path.glob("*.safetensors"))


def test_values_beyond_float16_are_refused_with_advice(tmp_path):
    store = open_store(tmp_path)
    values = features(0, range(4))
    values["grid"][1, 0, 0, 0] = 70000
    with store.building(), pytest.raises(ValueError, match="'case_01' holds a value beyond float16: store it as"):
        store.write_shard(0, 0, values)


def test_wrong_values_are_refused(tmp_path):
    store = open_store(tmp_path)
    good = features(0, range(4))
    with pytest.raises(ValueError, match=r"'grid' needs numbers of shape \(4, 6, 5, 4\)"):
        store.write_shard(0, 0, {**good, "grid": good["grid"][:3]})
    with pytest.raises(ValueError, match="needs numbers"):
        store.write_shard(0, 0, {**good, "grid": good["grid"].astype(complex)})
    with pytest.raises(ValueError, match="holds the arrays"):
        store.write_shard(0, 0, {"grid": good["grid"]})
    with pytest.raises(IndexError, match="no view 2"):
        store.write_shard(2, 0, good)
    for shard in (3, -1):
        with pytest.raises(IndexError, match=f"no shard {shard}"):
            store.write_shard(0, shard, good)
    assert store.missing() == store.shards


def test_a_shard_that_is_there_stays(tmp_path):
    store = open_store(tmp_path)
    store.write_shard(0, 0, features(0, range(4)))
    before = store.path(0, 0).stat()
    store.write_shard(0, 0, features(1, range(4)))
    after = store.path(0, 0).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    np.testing.assert_array_equal(store.read("pooled", [2]), features(0, [2])["pooled"])


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_ids": ["a"] * N},
        {"content_hashes": ["a"]},
        {"sample_ids": [], "content_hashes": []},
        {"views": 0},
        {"shard_size": 0},
        {"view_parameters": [1, 2, 3]},
        {"arrays": {}},
        {"arrays": {"../x": ArraySpec((1,))}},
    ],
)
def test_contradicting_arguments_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_store(tmp_path, **changes)


@pytest.mark.parametrize("spec", [((3,), "int8"), ((3, 0), "float16"), ((3,), "float64")])
def test_array_specs_that_cannot_work_are_refused(spec):
    with pytest.raises(ValueError, match=r"ArraySpec\("):
        ArraySpec(*spec)


def test_the_directory_depends_on_the_key(tmp_path):
    directory = store_directory(tmp_path, "medsam", KEY)
    assert directory.parent == tmp_path and directory.name == f"medsam-{fingerprint(2, KEY)[:16]}"
    assert store_directory(tmp_path, "medsam", {**KEY, "teacher": "other"}) != directory


def test_the_description_says_what_is_stored_and_is_written_once(tmp_path):
    store = open_store(tmp_path, origin={"from": "here"})
    store.create()
    before = (tmp_path / "store.json").stat()
    build(store)
    assert (tmp_path / "store.json").stat().st_mtime_ns == before.st_mtime_ns
    content = json.loads((tmp_path / "store.json").read_text())
    assert content["key"] == KEY and content["format"] == 2 and content["sample_ids"] == store.sample_ids
    assert content["arrays"]["codes"] == {"shape": [6, 5, 4], "dtype": "int8"}
    assert content["created_with"].keys() == {"amkd_monai", "numpy"}
    assert open_store(tmp_path, origin={"from": "elsewhere"}).origin == {"from": "here"}


def test_a_shard_is_a_plain_safetensors_file(tmp_path):
    """Any array is where the format wants it, aligned to its type, whatever the others are."""
    arrays = {**ARRAYS, "odd": ArraySpec((3, 1), "int8"), "one": ArraySpec(())}
    store = open_store(tmp_path, arrays=arrays, views=1)
    values = features(0, range(8, 11)) | {"odd": np.full((3, 3, 1), 2.0), "one": np.arange(3.0)}
    store.write_shard(0, 2, values)
    found = load_file(store.path(0, 2))
    assert found.keys() == {*arrays, "codes.scale", "odd.scale"}
    np.testing.assert_array_equal(found["grid"], store.read("grid", range(8, 11)))
    np.testing.assert_array_equal(found["one"], np.arange(3, dtype=np.float16))
    codes = found["codes"] * found["codes.scale"][:, :, None, None]
    np.testing.assert_array_equal(codes, store.read("codes", range(8, 11)))
    assert all(value.ctypes.data % value.itemsize == 0 for value in store._maps[0, 2].values())
    assert store.path(0, 2).stat().st_size == shard_bytes(arrays, 3)


def test_what_is_read_cannot_be_changed_in_the_store(tmp_path):
    store = build(open_store(tmp_path))
    store.read("grid", [0])[:] = 7
    assert not store._maps[0, 0]["grid"][0].flags.writeable
    np.testing.assert_array_equal(store.read("grid", [0]), features(0, [0])["grid"].astype(np.float16))


LARGE = """
import sys, time
from amkd_monai.cache.store import FeatureStore
from amkd_monai.memory import own_peak
start = time.perf_counter()
store = FeatureStore.open(sys.argv[1])
assert store.is_complete and len(store) == 100_000
print(time.perf_counter() - start, own_peak())
assert "torch" not in sys.modules
"""


def test_a_store_of_100000_samples_opens_within_a_second_and_200_mb(tmp_path):
    """Its shards are sparse files of the right size: what is in them is not read."""
    ids = [f"collection/case_{i:06d}#{i % 100:03d}" for i in range(100_000)]
    hashes = [f"{i:016x}-{i:016x}" for i in range(100_000)]
    store = open_store(tmp_path, sample_ids=ids, content_hashes=hashes, views=1, shard_size=128)
    store.create()
    for at in store.shards:
        with store.path(*at).open("wb") as file:
            file.truncate(shard_bytes(ARRAYS, len(store.samples_of(at[1]))))
    took = min(opened(tmp_path) for _ in range(3))
    assert took[0] < 1 and took[1] < 200


def opened(directory):
    """Seconds and peak MB of a process that opens a store of 100,000 samples."""
    command = [sys.executable, "-c", LARGE, str(directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, ended.stdout.split())
    return seconds, peak


def test_more_shards_than_open_files_are_read(tmp_path):
    resource = pytest.importorskip("resource")
    arrays = {"score": ArraySpec((), "float32")}
    count = 400
    ids = [f"{i}" for i in range(count)]
    store = open_store(tmp_path, sample_ids=ids, content_hashes=ids, arrays=arrays, views=1, shard_size=1)
    for view, shard in store.shards:
        store.write_shard(view, shard, {"score": np.array([shard])})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        assert store.read("score", range(count)).tolist() == list(range(count))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_adding_a_shard_costs_the_same_at_shard_10_and_at_shard_10000(tmp_path):
    count = 10_100
    ids = [f"case_{i:05d}" for i in range(count)]
    arrays = {"score": ArraySpec((4,), "float32")}
    store = open_store(tmp_path, sample_ids=ids, content_hashes=ids, arrays=arrays, views=1, shard_size=1)
    store.create()

    def add(shards):
        """Median of CPU seconds per shard."""
        times = []
        for shard in shards:
            start = time.process_time()
            store.write_shard(0, shard, {"score": np.ones((1, 4))})
            times.append(time.process_time() - start)
        return float(np.median(times))

    early = add(range(10, 110))
    for shard in range(110, 10_000):  # stand-ins: only that they are there counts
        store.path(0, shard).touch()
    late = add(range(10_000, 10_100))
    assert late < 2 * early


def test_a_pickled_store_reads_but_carries_no_data(tmp_path):
    store = build(open_store(tmp_path))
    store.read("grid", range(N))
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._maps
    np.testing.assert_array_equal(copy.read("grid", [2, 9]), store.read("grid", [2, 9]))


def test_import_needs_no_torch():
    code = "import amkd_monai.cache.store, sys; assert not {'torch', 'monai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
