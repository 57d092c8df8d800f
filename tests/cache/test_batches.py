"""Batches of a teacher: their default, and what happens when memory runs out."""

import gc
import logging
import os
import resource
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_dataset import CountingTeacher, decoded, write_items

from amkd_monai.cache.build import BATCH_SIZE, Batches, cache_teacher
from amkd_monai.memory import own_peak

OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    "cuda runtime": RuntimeError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "numpy": MemoryError("Unable to allocate 1 TiB"),
}


def sizes(batches, count, work=list):
    return [len(batch) for batch, _ in batches.run(work, range(count))]


def room_for(most, error):
    def work(batch):
        if len(batch) > most:
            raise error
        return list(batch)

    return work


def test_one_first_then_the_default_of_the_device():
    assert sizes(Batches(), 9) == [1, 4, 4] and BATCH_SIZE["cpu"] == 4
    assert sizes(Batches(None, "cuda:1"), 130) == [1, 64, 64, 1]
    assert sizes(Batches(5), 8) == [5, 3] and sizes(Batches(5), 0) == []
    with pytest.raises(ValueError, match="teacher_batch_size is 0"):
        Batches(0)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_without_memory_the_batch_is_halved_for_good(caplog, kind):
    """Every item comes once and in order; what does not fit alone is an error."""
    batches, error = Batches(7), OUT_OF_MEMORY[kind]
    with caplog.at_level(logging.WARNING):
        found = list(batches.run(room_for(2, error), range(5)))
    assert [said for _, said in found] == [[0, 1], [2, 3], [4]] and "memory with 5 images" in caplog.text
    assert sizes(batches, 4, room_for(2, error)) == [2, 2]
    with pytest.raises(type(error)):
        list(Batches(7).run(room_for(0, error), range(5)))


def test_another_error_is_passed_on_at_once():
    calls = []

    def work(batch):
        calls.append(len(batch))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot"):
        list(Batches(4).run(work, range(8)))
    assert calls == [4]


def test_what_a_failed_batch_held_is_free_before_the_next_one():
    held = []

    def work(batch):
        gc.disable()
        assert not any(ref() is not None for ref in held), "freed without the collector"
        tensor = torch.ones(len(batch))
        held.append(weakref.ref(tensor))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(batch)

    try:
        assert sizes(Batches(8), 4, work) == [2, 2]
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_allocator_of_torch_really_runs_out_and_the_work_ends():
    """In a forked process with room for two and a half items of 2 GB, more than free memory of the tests before."""
    child = os.fork()
    if child == 0:
        found = []
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 5 * 2**30,) * 2)
            found = sizes(Batches(8), 5, lambda batch: torch.empty(len(batch), 2**29).shape)
        finally:
            os._exit(found != [2, 2, 1])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_store_is_the_same_whatever_the_batch(tmp_path):
    dataset = decoded(write_items(tmp_path / "in", 9), tmp_path)
    stores, expected = {}, {1: [1] * 18, None: [1, 4, 4, 4, 4, 1], 6: [1, 6, 2, 6, 3]}
    for size, batches in expected.items():
        asked = []
        teacher = CountingTeacher(gives_logits=True)
        teacher.register_forward_pre_hook(lambda _, inputs, asked=asked: asked.append(len(inputs[0])))
        stores[size] = cache_teacher(teacher, dataset, tmp_path / str(size), batch_size=size, views=2)
        assert asked == batches
    for array in stores[1].arrays:
        for view in range(2):
            one, *others = (store.read(array, range(9), view).astype(np.float32) for store in stores.values())
            for other in others:
                np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4)


def test_a_teacher_that_runs_out_of_memory_is_stored_all_the_same(tmp_path):
    dataset = decoded(write_items(tmp_path / "in", 9), tmp_path)

    class Large(CountingTeacher):
        def forward(self, image):
            if len(image) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(image)

    small, plain = Large(), CountingTeacher()
    store = cache_teacher(small, dataset, tmp_path / "a", batch_size=8)
    whole = cache_teacher(plain, dataset, tmp_path / "b", batch_size=2)
    assert small.seen == 9 and store.is_complete
    np.testing.assert_array_equal(store.read("grid", range(9)), whole.read("grid", range(9)))


def test_building_says_how_many_at_once_and_its_peak(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "amkd_monai"):
        cache_teacher(CountingTeacher(), decoded(write_items(tmp_path / "in", 3), tmp_path), tmp_path)
    (line,) = (record.getMessage() for record in caplog.records if "peak memory of the process" in record.getMessage())
    assert line.startswith("teacher toy ran on 3 images, 4 at once") and float(line.split()[-2]) <= own_peak() + 1
