"""What is remembered of teachers, so that a cached run reads none of their files."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_teachers import TINY, official_state, tiny

from amkd_monai.distillation.interface import UNCALIBRATED, Calibration
from amkd_monai.engines import prepare
from amkd_monai.engines.prepare import cache_image_teacher
from amkd_monai.teachers.plan import KNOWN, known_teacher

sys.path.append(str(Path(__file__).parent.parent / "cache"))
from toy_dataset import decoded, write_items

from amkd_monai.cache.build import answers_store, keep_answers

KINDS = ["medsam", "retfound", "usfm", "biomedparse"]


def write(which, path, change=0.0):
    teacher = tiny(which)
    for parameter in teacher.network.parameters():
        parameter.data.add_(change)
    torch.save(official_state(which, teacher), path)


def described(which, path):
    sizes = {k: v for k, v in TINY[which].items() if k != "num_classes"}
    return {"name": which, **sizes, "weights": None if path is None else str(path)}


@pytest.fixture
def unread(monkeypatch):
    """From now on no teacher may be built, nor a file be hashed."""

    def forbid():
        def never(*_, **__):
            raise AssertionError("a weight file was read")

        monkeypatch.setattr("amkd_monai.teachers.plan.build_teacher", never)
        monkeypatch.setattr("amkd_monai.teachers.base.file_sha256", never)
        monkeypatch.setattr("amkd_monai.weights.load_state_dict", never)

    return forbid


@pytest.mark.parametrize("which", KINDS)
def test_a_cached_run_reads_no_weights(which, tmp_path, unread):
    write(which, tmp_path / "weights.pth")
    train, validation = (decoded(write_items(tmp_path / s, n), tmp_path) for s, n in (("train", 3), ("validation", 2)))
    given = (train, validation, 2, None, described(which, tmp_path / "weights.pth"))
    facts, *stores = cache_image_teacher(*given, cache_dir=tmp_path)
    unread()
    again, *same = cache_image_teacher(*given, cache_dir=tmp_path)
    assert again == facts and [s.directory for s in same] == [s.directory for s in stores]
    assert facts.weights_file is not None and facts.side == TINY[which]["image_size"]


def test_a_changed_file_is_another_teacher(tmp_path):
    file, first = tmp_path / "weights.pth", None
    write("usfm", file)
    first = known_teacher(described("usfm", file), None, tmp_path).facts()
    write("usfm", file, change=0.1)
    changed = known_teacher(described("usfm", file), None, tmp_path).facts()
    assert changed.fingerprint != first.fingerprint and changed.weights_file != first.weights_file
    write("usfm", file)
    assert known_teacher(described("usfm", file), None, tmp_path).facts() == first


def test_other_options_are_another_teacher(tmp_path):
    file = tmp_path / "weights.pth"
    write("usfm", file)
    facts = [
        known_teacher({**described("usfm", file), "grid_limit": limit}, None, tmp_path).facts() for limit in (2, 16, 2)
    ]
    assert facts[0] == facts[2] != facts[1] and facts[0].fingerprint != facts[1].fingerprint


def test_a_file_that_changed_unseen_is_refused_when_it_is_asked(tmp_path):
    file = tmp_path / "weights.pth"
    write("usfm", file)
    status = file.stat()
    known_teacher(described("usfm", file), None, tmp_path)
    write("usfm", file, change=0.1)
    assert file.stat().st_size == status.st_size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=r"weights\.pth kept size and time"):
        known_teacher(described("usfm", file), None, tmp_path).ready()


def test_a_file_that_is_found_first_or_gone_counts(tmp_path, monkeypatch):
    monkeypatch.delenv("AMKD_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "mine").mkdir()
    write("usfm", tmp_path / "weights" / "USFM_latest.pth")
    description = described("usfm", None)
    del description["weights"]
    found = known_teacher(description, str(tmp_path / "mine"), tmp_path).facts()
    write("usfm", tmp_path / "mine" / "USFM_latest.pth", change=0.1)
    mine = known_teacher(description, str(tmp_path / "mine"), tmp_path).facts()
    assert mine.fingerprint != found.fingerprint
    for folder in ("mine", "weights"):
        (tmp_path / folder / "USFM_latest.pth").unlink()
    with pytest.raises(RuntimeError, match=r"USFM_latest\.pth"):
        known_teacher(description, str(tmp_path / "mine"), tmp_path)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[]"])
def test_a_damaged_table_is_built_again(tmp_path, content, unread):
    file = tmp_path / "weights.pth"
    write("usfm", file)
    first = known_teacher(described("usfm", file), None, tmp_path).facts()
    (tmp_path / KNOWN).write_text(content)
    assert known_teacher(described("usfm", file), None, tmp_path).facts() == first
    unread()
    assert known_teacher(described("usfm", file), None, tmp_path).facts() == first


def test_random_teachers_and_classes_of_ones_own_are_built_each_time(tmp_path):
    own = {"name": "toy", "kind": "toy_dataset.CountingTeacher"}
    for description in (own, {"name": "usfm", **TINY["usfm"]}):
        assert known_teacher(description, None, tmp_path).built is not None
        assert known_teacher(description, None, tmp_path).built is not None
    assert not (tmp_path / KNOWN).exists()


def test_the_score_of_the_same_answers_is_computed_once(tmp_path, monkeypatch):
    train, rng = decoded(write_items(tmp_path / "in", 4), tmp_path), np.random.default_rng(0)
    stores = [answers_store(f"a{n}", {"number": n}, train, (4, 4), tmp_path) for n in range(2)]
    for store in stores:
        keep_answers(store, rng.normal(size=(4, 2, 4, 4)).astype(np.float32))
    shared = SimpleNamespace(cache_dir=str(tmp_path), train=train)
    given = [(stores[0], UNCALIBRATED), (stores[1], UNCALIBRATED), (stores[0], Calibration(3.0))]
    first = [prepare._Preparation._score(shared, *one) for one in given]
    assert first == [prepare.score_answers(store, train, calibration) for store, calibration in given]
    monkeypatch.setattr(prepare, "score_answers", None)
    assert [prepare._Preparation._score(shared, *one) for one in given] == first
