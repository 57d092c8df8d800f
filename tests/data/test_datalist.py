import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, shared_data

from amkd_monai.data import phantoms
from amkd_monai.data.datalist import Datalist, datalist, inference_datalist, resolve_dataset_dir
from amkd_monai.data.datasets import TASKS, get_task


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Small phantoms of both tasks in one folder."""
    root = tmp_path_factory.mktemp("sets")
    get_task("kvasir_seg").write_phantom(root, count=20, size=(40, 60))
    get_task("msd_heart").write_phantom(root, cases=5, shape=(6, 20, 24))
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch, pristine):
    """An empty working folder without data; phantoms are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMKD_DATA_ROOT", raising=False)
    small = partial(phantoms.kvasir_seg, count=20, size=(40, 60))
    monkeypatch.setitem(TASKS, "kvasir_seg", replace(TASKS["kvasir_seg"], phantom=small))
    return tmp_path


def ids(items):
    return [item["id"] for item in items]


def test_own_data_that_are_gone_are_named_and_nothing_is_written(workplace):
    own = {
        "name": "own",
        "classes": ["background", "cell"],
        "modality": "x",
        "folder": str(workplace / "gone" / "data"),
    }
    with pytest.raises(FileNotFoundError, match=own["folder"]):
        resolve_dataset_dir(own, cache_dir="cache")
    assert not list(workplace.iterdir())


def test_order_of_the_places_that_are_searched(workplace, pristine, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "amkd_monai"):
        root, source = resolve_dataset_dir("kvasir_seg", cache_dir="cache")
        assert (root, source) == (Path("cache/phantoms/Kvasir-SEG"), "phantoms")
        assert "NO DATA FOUND" in caplog.text and "PHANTOMS" in caplog.text
        assert "a demonstration, not a result" in caplog.text
        assert "--dataset_dir" in caplog.text and "AMKD_DATA_ROOT" in caplog.text
        caplog.clear()

        shutil.copytree(pristine / "Kvasir-SEG", workplace / "data" / "Kvasir-SEG")
        assert resolve_dataset_dir("kvasir_seg") == (Path("data/Kvasir-SEG"), "data folder")

        monkeypatch.setenv("AMKD_DATA_ROOT", str(pristine))
        assert resolve_dataset_dir("kvasir_seg") == (pristine / "Kvasir-SEG", "environment")

        given = str(workplace / "data" / "Kvasir-SEG")
        assert resolve_dataset_dir("kvasir_seg", given) == (Path(given), "argument")
        assert not caplog.records


def test_a_data_root_without_the_data_set_is_announced(workplace, monkeypatch, caplog):
    monkeypatch.setenv("AMKD_DATA_ROOT", str(workplace))
    with caplog.at_level(logging.WARNING, "amkd_monai"):
        assert resolve_dataset_dir("kvasir_seg")[1] == "phantoms"
    assert "no folder Kvasir-SEG in AMKD_DATA_ROOT" in caplog.text


def test_a_data_root_that_is_not_there_is_an_error(workplace, monkeypatch):
    monkeypatch.setenv("AMKD_DATA_ROOT", str(workplace / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"AMKD_DATA_ROOT names .*nowhere"):
        resolve_dataset_dir("kvasir_seg")


@pytest.mark.parametrize("function", [datalist, inference_datalist, resolve_dataset_dir])
def test_a_given_folder_that_is_missing_is_never_replaced(workplace, function):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        function("kvasir_seg", str(workplace / "nowhere"))
    assert list(workplace.iterdir()) == []


def test_phantoms_are_generated_once_and_marked(workplace):
    first = datalist("kvasir_seg", cache_dir="cache")
    written = (first.root / "images").stat().st_mtime_ns
    again = datalist("kvasir_seg", cache_dir="cache")
    assert (again.root / "images").stat().st_mtime_ns == written
    assert first.is_phantom and first.hash == again.hash
    assert datalist("kvasir_seg", str(first.root)).is_phantom  # also where they are given as an argument


def test_an_unknown_task_lists_the_known_ones(workplace):
    with pytest.raises(ValueError, match=f"Unknown task 'liver': use one of {', '.join(sorted(TASKS))}"):
        datalist("liver")


def test_kvasir_is_split_by_fractions(pristine):
    result = datalist("kvasir_seg", str(pristine / "Kvasir-SEG"), fractions=(0.5, 0.25, 0.25))
    assert [len(items) for items in result.sections.values()] == [10, 5, 5, 0]
    assert result.task is TASKS["kvasir_seg"]


def test_heart_is_cross_validated(pristine):
    folder = str(pristine / "Task02_Heart")
    results = [datalist("msd_heart", folder, folds=5, fold=fold) for fold in range(5)]
    assert all([len(items) for items in result.sections.values()] == [3, 1, 1, 0] for result in results)
    assert sorted(ids(result.test)[0] for result in results) == [f"la_00{i}" for i in range(1, 6)]
    assert len({result.hash for result in results}) == 5


def test_the_hash_depends_on_the_split_and_not_on_the_place(pristine, tmp_path):
    here = datalist("kvasir_seg", str(pristine / "Kvasir-SEG"))
    elsewhere = shutil.copytree(pristine / "Kvasir-SEG", tmp_path / "other name")
    assert datalist("kvasir_seg", str(elsewhere)).hash == here.hash
    assert datalist("kvasir_seg", str(pristine / "Kvasir-SEG")) == here
    assert datalist("kvasir_seg", str(pristine / "Kvasir-SEG"), seed=1).hash != here.hash
    assert datalist("kvasir_seg", str(pristine / "Kvasir-SEG"), labelled=3).hash != here.hash


def test_empty_train_or_validation_is_an_error(pristine):
    for fractions, name in (((0.8, 0, 0.2), "validation"), ((0, 0.5, 0.5), "train")):
        with pytest.raises(ValueError, match=rf"The {name} section of .* is empty"):
            datalist("kvasir_seg", str(pristine / "Kvasir-SEG"), fractions=fractions)


@pytest.mark.parametrize("other", ["validation", "test"])
def test_a_group_in_two_sections_is_an_error(pristine, monkeypatch, other):
    def leaking_split(layout, root, items, how):
        sections = {"train": items[:10], "validation": items[10:15], "test": items[15:]}
        sections[other] = [{**sections[other][0], "group": items[0]["group"]}, *sections[other][1:]]
        return tuple(sections.values())

    monkeypatch.setattr(type(TASKS["kvasir_seg"].layout), "split", leaking_split)
    with pytest.raises(ValueError, match=rf"'phantom_000' is in the sections train and {other}"):
        datalist("kvasir_seg", str(pristine / "Kvasir-SEG"))


def test_description_for_the_run_record(pristine):
    result = datalist("kvasir_seg", str(pristine / "Kvasir-SEG"), labelled=4)
    described = json.loads(json.dumps(result.describe()))
    assert described == {
        "task": "kvasir_seg",
        "source": "argument",
        "root": str(pristine / "Kvasir-SEG"),
        "phantom": True,
        "stand_in": "",
        "counts": {"train": 4, "validation": 3, "test": 3, "unlabelled": 10},
        "groups": {"train": 4, "validation": 3, "test": 3, "unlabelled": 10},
        "split_hash": result.hash,
    }


def test_a_stand_in_says_so(pristine, tmp_path):
    folder = shutil.copytree(pristine / "Kvasir-SEG", tmp_path / "Kvasir-SEG")
    (folder / "STAND-IN.txt").write_text("Frames of a pig, in place of Kvasir-SEG.\nMore about them.\n")
    assert datalist("kvasir_seg", folder).describe()["stand_in"] == "Frames of a pig, in place of Kvasir-SEG."
    assert datalist("kvasir_seg", folder, stand_in="Given").describe()["stand_in"] == "Given"
    assert datalist("kvasir_seg", folder).hash == datalist("kvasir_seg", pristine / "Kvasir-SEG").hash


@pytest.mark.parametrize(("content", "words"), [(b"\n", "has no first line"), (b"gr\xfcn", "is neither UTF-8")])
def test_a_marker_that_says_nothing_is_refused(pristine, tmp_path, content, words):
    folder = shutil.copytree(pristine / "Kvasir-SEG", tmp_path / "Kvasir-SEG")
    (folder / "STAND-IN.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"STAND-IN\.txt {words}"):
        datalist("kvasir_seg", folder)


def test_split_list_is_written(pristine, tmp_path):
    result = datalist("kvasir_seg", str(pristine / "Kvasir-SEG"), labelled=4)
    result.write_split(tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [f"split_kvasir_seg_{result.hash[:12]}.json"]
    written = json.loads((tmp_path / "run" / f"split_kvasir_seg_{result.hash[:12]}.json").read_text())
    assert written["hash"] == result.hash
    for name, items in result.sections.items():
        assert written[name] == [[item["id"], item["group"]] for item in items]
    assert str(pristine) not in json.dumps(written)


def test_another_split_than_the_one_asked_for_is_refused(pristine):
    folder = str(pristine / "Kvasir-SEG")
    wanted = datalist("kvasir_seg", folder).hash
    assert datalist("kvasir_seg", folder, split_hash=wanted).hash == wanted
    with pytest.raises(ValueError, match=wanted[:12]):
        datalist("kvasir_seg", folder, seed=1, split_hash=wanted)


def test_twelve_labels_of_the_real_kvasir():
    root = str(shared_data("Kvasir-SEG"))
    everything, few = datalist("kvasir_seg", root), datalist("kvasir_seg", root, labelled=12)
    assert not few.is_phantom
    assert (len(few.train), len(few.unlabelled)) == (12, len(everything.train) - 12)
    assert sorted(ids(few.train + few.unlabelled)) == ids(everything.train)
    assert (few.validation, few.test) == (everything.validation, everything.test)
    assert all("label" in item for item in few.train)
    assert not any("label" in item for item in few.unlabelled)


def test_real_heart_folds_never_part_the_identical_images():
    root = str(shared_data("MSD-Heart", "Task02_Heart_half"))
    for fold in range(5):
        result = datalist("msd_heart", root, fold=fold)
        holders = [name for name, items in result.sections.items() if {"la_005", "la_026"} & set(ids(items))]
        assert len(holders) == 1
        assert 2 <= len(result.test) <= 3


def test_inference_datalist(pristine):
    items = inference_datalist("msd_heart", str(pristine / "Task02_Heart"))
    assert ids(items) == ["la_006", "la_007"]
    assert items[0].keys() == {"image", "id"}
    assert len(inference_datalist("kvasir_seg", str(pristine / "Kvasir-SEG" / "images"))) == 20


def test_every_task_is_complete():
    assert all(name == task.name for name, task in TASKS.items())
    for task in TASKS.values():
        assert callable(task.phantom) and bool(task.source.files) != bool(task.source.steps)
        assert task.is_classification or task.classes[0] == "background"
        assert task.kind in ("segmentation", "classification") and set(task.singled_out) <= set(task.classes)
        assert len(task.prompts) == len(task.classes) - 1


def test_a_datalist_cannot_be_changed(pristine):
    result = datalist("kvasir_seg", str(pristine / "Kvasir-SEG"))
    assert isinstance(result, Datalist)
    with pytest.raises(AttributeError):
        result.train = []


def test_datalists_need_neither_torch_nor_monai():
    script = "import sys, amkd_monai.data.datalist; sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
