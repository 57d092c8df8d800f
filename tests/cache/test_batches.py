import logging

import numpy as np
import psutil
import pytest
import torch
from toy_dataset import CountingTeacher, decoded, write_items

from amkd_monai.cache import batches
from amkd_monai.cache.batches import LARGEST, Batches, available_memory, batch_for, control_group_room
from amkd_monai.cache.build import cache_teacher
from amkd_monai.memory import own_peak

MB = 1e6


def sizes(chosen, count, work=list):
    return [len(batch) for batch, _ in chosen.run(work, range(count))]


@pytest.fixture
def with_memory(monkeypatch):
    """Set the free memory and what one image takes, bytes."""

    def set_both(available, taken):
        monkeypatch.setattr(batches, "available_memory", lambda device: available)
        monkeypatch.setattr(batches, "_resident_rise", lambda work, device: (work(), taken))

    return set_both


def test_a_batch_takes_at_most_half_of_the_memory():
    assert batch_for(100 * MB, 10 * MB, 64) == 5
    assert batch_for(100 * MB, 90 * MB, 64) == 1 and batch_for(0, 90 * MB, 64) == 1
    assert batch_for(100 * MB, 0, 64) == 64


def test_one_first_then_as_many_as_fit(with_memory):
    with_memory(60 * MB, 10 * MB)
    assert sizes(Batches("cpu"), 8) == [1, 3, 3, 1]
    with_memory(1 * MB, 10 * MB)
    assert sizes(Batches("cpu"), 3) == [1, 1, 1]
    with_memory(1e12, 10 * MB)
    assert sizes(Batches("cpu"), 2 * LARGEST["cpu"] + 1) == [1, LARGEST["cpu"], LARGEST["cpu"]]
    assert sizes(Batches("cpu", 5), 8) == [5, 3]


def test_what_an_image_takes_is_measured():
    """Also where the process has had more before."""
    earlier = np.ones(30_000_000)
    del earlier

    def work():
        array = np.ones(10_000_000)  # 80 MB
        return float(array.sum())

    result, taken = batches._resident_rise(work, torch.device("cpu"))
    assert result == 1e7 and 70 * MB < taken < 200 * MB


def test_what_an_image_takes_from_a_hole_in_the_heap_is_measured():
    """A long-lived process has freed memory that stays resident; an image that fills it must not seem to take none."""
    np.ones(4_000_000)  # freed, it raises the size from which glibc maps memory instead of taking it from the heap
    blocks = [np.ones(2_000_000) for _ in range(12)]  # 16 MB each
    top = np.ones(2_000_000)
    blocks.clear()
    _, taken = batches._resident_rise(lambda: float(np.ones(10_000_000).sum()), torch.device("cpu"))
    assert 70 * MB < taken < 200 * MB and top.sum() == 2e6


def test_an_error_ends_the_measurement():
    with pytest.raises(ZeroDivisionError):
        batches._resident_rise(lambda: 1 / 0, torch.device("cpu"))


def test_without_room_the_batch_is_halved(caplog):
    """Every item comes once and in order; what does not fit alone is an error."""

    def room_for(most):
        def work(batch):
            if len(batch) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return list(batch)

        return work

    with caplog.at_level(logging.WARNING):
        found = list(Batches("cpu", 7).run(room_for(2), range(5)))
    assert [said for _, said in found] == [[0, 1], [2, 3], [4]] and "no room for 5 images" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        list(Batches("cpu", 7).run(room_for(0), range(5)))


def test_the_store_is_the_same_whatever_the_batch(tmp_path, with_memory):
    dataset = decoded(write_items(tmp_path / "in", 9), tmp_path)
    stores = {}
    for name, available in (("one", 1.0), ("many", 1e12)):
        with_memory(available, 10 * MB)
        asked = []
        teacher = CountingTeacher(gives_logits=True)
        teacher.register_forward_pre_hook(lambda _, inputs, asked=asked: asked.append(len(inputs[0])))
        stores[name] = cache_teacher(teacher, dataset, tmp_path / name, views=2)
        expected = {"one": [1] * 18, "many": [1, 4, 4, 4, 4, 1]}
        assert asked == expected[name]
    for array in stores["one"].arrays:
        for view in range(2):
            one, many = (stores[name].read(array, range(9), view).astype(np.float32) for name in ("one", "many"))
            np.testing.assert_allclose(one, many, rtol=2e-3, atol=1e-4)


def test_building_says_how_many_at_once_and_its_peak(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "amkd_monai"):
        cache_teacher(CountingTeacher(), decoded(write_items(tmp_path / "in", 3), tmp_path), tmp_path)
    (line,) = (record.getMessage() for record in caplog.records if "peak memory of the process" in record.getMessage())
    assert line.startswith("teacher toy was asked 3 times, ") and float(line.split()[-2]) <= own_peak() + 1


def test_processes_of_torchrun_share_the_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8_000}))
    monkeypatch.setattr(batches, "control_group_room", lambda: float("inf"))
    assert available_memory(torch.device("cpu")) == 8_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory(torch.device("cpu")) == 2_000
    monkeypatch.setattr(batches, "control_group_room", lambda: 400.0)
    assert available_memory(torch.device("cpu")) == 100


def test_a_container_has_less_than_the_machine(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    job = root / "slurm" / "job"
    job.mkdir(parents=True)
    assert control_group_room(proc, root) == float("inf")
    proc.write_text("4:memory:/other\n0::/slurm/job\n")
    assert control_group_room(proc, root) == float("inf")
    for folder, limit in ((job, "max"), (job.parent, "1000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert control_group_room(proc, root) == 500
    (job / "memory.max").write_text("100\n")
    assert control_group_room(proc, root) == 0
