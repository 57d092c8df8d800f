"""`python -m amkd_monai cache`: what is there, whether it is right, what may go."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import toy_dataset
import toy_store
from helpers import ROOT
from PIL import Image
from toy_dataset import CountingTeacher, decoded, write_items

from amkd_monai.__main__ import main
from amkd_monai.cache.build import cache_teacher
from amkd_monai.cache.store import LOCK, FeatureStore

TOY = {"name": "toy", "kind": "toy_dataset.CountingTeacher", "gives_logits": True}


@pytest.fixture
def items(tmp_path):
    return write_items(tmp_path / "in", 6)


def cached(items, folder, **options):
    teacher = CountingTeacher(gives_logits=True)
    return cache_teacher(teacher, decoded(items, folder), folder, description=TOY, **options)


def run(capsys, *arguments):
    code = main(["cache", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_status_lists_what_is_stored_without_torch(tmp_path):
    toy_store.build(toy_store.open_store(tmp_path / "busi" / "toy-00"))
    half = toy_store.open_store(tmp_path / "busi" / "half-00")
    with half.building():
        half.write_shard(0, 0, toy_store.features(0, range(4)))
    (tmp_path / "busi" / "broken-00").mkdir()
    (tmp_path / "busi" / "broken-00" / "store.json").write_text("{")
    code = "import sys; from amkd_monai.__main__ import main; code = main(['cache', 'status', sys.argv[1]]); "
    code += "assert not {'torch', 'monai'} & set(sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    broken, halved, whole, fault = ended.stdout.splitlines()[2:]
    assert "damaged" in broken and "store.json is damaged" in fault and "incomplete (1 of 26 shards)" in halved
    assert whole.split()[:4] == ["busi", "toy", "50", "2"] and "codes int8 3x4x4" in whole and "complete" in whole
    assert "0.3" in whole.split()  # kB per image: 2 views of 96 + 48 + 12 bytes


def test_a_folder_without_stores(tmp_path, capsys):
    assert run(capsys, "status", tmp_path)[:2] == (0, f"{tmp_path} holds no feature store.\n")
    code, _, error = run(capsys, "status", tmp_path / "none")
    assert code == 1 and error.startswith("error: ") and "cache_dir" in error


def test_verify_finds_flipped_bytes_and_another_teacher(items, tmp_path, capsys, monkeypatch):
    store = cached(items, tmp_path)
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 0 and "good, complete (checksums, and" in out and "1 stores, 0 faulty" in out
    file = store.path(0, 0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 1 and f"{file} does not have the hash in its header: delete it" in out and file.is_file()
    monkeypatch.setattr(CountingTeacher, "preprocessing", lambda self: {"size": 99})
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 1 and "preprocessing of its teacher changed" in out


@pytest.mark.parametrize("missing", ["teacher", "description"])
def test_verify_says_what_it_could_not_compare(items, tmp_path, capsys, monkeypatch, missing):
    store = cached(items, tmp_path)
    if missing == "teacher":
        monkeypatch.delattr(toy_dataset, "CountingTeacher")
    else:
        path = store.directory / "store.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "origin": {}}))
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 0 and "good, complete (checksums alone: " in out


def test_prune_removes_what_no_run_can_use(items, tmp_path, capsys):
    stale = cached(items, tmp_path)
    Image.fromarray(np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)).save(items[0]["image"])
    kept = cached(items, tmp_path)  # the image of item 0 is another one under the same name
    os.utime(stale.directory / "store.json", (1, 1))
    half = toy_store.open_store(tmp_path / "half-00")
    with half.building():
        half.write_shard(0, 0, toy_store.features(0, range(4)))
    orphan = toy_store.build(toy_store.open_store(tmp_path / "orphan-00"))
    before = sorted(tmp_path.iterdir())
    code, listed, _ = run(capsys, "prune", tmp_path, "--dry_run")
    assert code == 0 and "3 of 4 stores would be removed" in listed and sorted(tmp_path.iterdir()) == before
    assert "stale: images changed since" in listed and "incomplete (1 of 26" in listed and "are gone" in listed
    code, done, _ = run(capsys, "prune", tmp_path)
    assert code == 0 and "3 of 4 stores are removed" in done
    assert (
        not any(s.directory.exists() for s in (stale, half, orphan)) and FeatureStore.open(kept.directory).is_complete
    )
    assert (tmp_path / kept.key["decoded"]).is_dir()


def test_a_store_that_is_being_built_is_not_pruned(tmp_path, capsys):
    store = toy_store.open_store(tmp_path / "busy-00")
    with store.building():
        code, _, error = run(capsys, "prune", tmp_path)
        assert code == 1 and str(store.directory / LOCK) in error
    assert (store.directory / "store.json").is_file()
    assert "incomplete (0 of 26 shards)" in run(capsys, "status", tmp_path)[1]
