"""Words become descriptions that suit the data set."""

import dataclasses
import re

import pytest
from helpers import ROOT
from teachers.tiny_teachers import OFFICIAL

from amkd_monai.data.datasets import TASKS
from amkd_monai.teachers import catalogue
from amkd_monai.teachers.catalogue import FOUNDATION, entry
from amkd_monai.teachers.plan import CREWS, ENCODERS, choose, seen
from amkd_monai.weights import CheckpointError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An empty folder for weight files, and no other place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMKD_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def names(teachers, task="busi", **options):
    return [d["name"] for d in choose(teachers, TASKS[task], **options)[0]]


def test_auto_takes_what_is_found_and_else_none(files):
    described, (line, alone) = choose("auto", TASKS["busi"])
    assert described == [] and "labels alone" in alone and choose("none", TASKS["busi"]) == ([], [alone])
    assert "python -m amkd_monai teachers" in line and str(files.name) in line
    for kind in reversed(FOUNDATION):
        (files / OFFICIAL[kind]).touch()
    described, lines = choose("auto", TASKS["busi"])
    assert [d["name"] for d in described] == list(FOUNDATION) and len(lines) == 4
    for kind, line in zip(FOUNDATION, lines, strict=True):
        teacher = entry(kind)
        assert OFFICIAL[kind] in line and teacher.licence in line and seen(teacher, TASKS["busi"]) in line
        assert ("fundus images alone" in line) == (kind == "retfound")


def test_auto_means_a_small_crew_where_images_without_labels_take_part_and_no_file_is_found(files):
    described, (line,) = choose("auto", TASKS["busi"], unlabelled=True)
    assert described == [CREWS["crew_small"]] and "small crew" in line
    assert names("imagenet_lite1", unlabelled=True) == ["imagenet_lite1"]
    (files / OFFICIAL["usfm"]).touch()
    assert names("auto", unlabelled=True) == ["usfm"]


def test_words_name_some_all_or_none(files):
    for file in OFFICIAL.values():
        (files / file).touch()
    assert names("none") == [] == names([])
    assert names("usfm+medsam") == names(["usfm", "medsam"]) == ["usfm", "medsam"]
    assert names("foundation + imagenet_lite2") == [*FOUNDATION, "imagenet_lite2"]
    assert choose("imagenet", TASKS["busi"]) == (ENCODERS, []), "encoders alone need no announcement"
    assert names("imagenet+crew_small") == names("imagenet_lite1+imagenet_lite2+crew_small")
    assert names(["auto", {"name": "vit", "kind": "timm"}]) == [*FOUNDATION, "vit"]


@pytest.mark.parametrize(
    ("word", "named"),
    [("foundation", list(OFFICIAL.values())), ("medsam+usfm", ["medsam_vit_b.pth"]), ("retfound", ["RETFound_mae"])],
)
def test_a_demanded_file_that_is_missing_is_named_with_its_source(files, word, named):
    with pytest.raises(CheckpointError) as error:
        choose(word, TASKS["busi"])
    text = str(error.value)
    assert all(name in text for name in named) and "get them" in text and "\n" not in text


@pytest.mark.parametrize("word", ["medsan", "auto+timm", "none+auto", "", "specialist"])
def test_words_that_mean_nothing_are_refused(files, word):
    with pytest.raises(ValueError, match=r"medsam, usfm, retfound, biomedparse, crew, .*imagenet"):
        choose(word, TASKS["busi"])


@pytest.mark.parametrize("teachers", [None, {"name": "x", "kind": "timm"}, 3, [3]])
def test_settings_that_are_neither_words_nor_descriptions_are_refused(teachers):
    with pytest.raises(ValueError, match="a word or a list of descriptions"):
        choose(teachers, TASKS["busi"])


def test_two_teachers_of_one_name_are_refused(files):
    (files / OFFICIAL["medsam"]).touch()
    for twice in ("medsam+auto", ["auto", {"name": "medsam", "kind": "timm"}]):
        with pytest.raises(ValueError, match="Two teachers are named 'medsam'"):
            choose(twice, TASKS["busi"])


def test_a_missing_package_ends_what_was_demanded_and_is_told_otherwise(files, monkeypatch):
    (files / OFFICIAL["medsam"]).touch()
    monkeypatch.setattr(catalogue, "missing_packages", lambda teacher: ["segment-anything"])
    with pytest.raises(ValueError, match="pip install segment-anything"):
        choose("medsam", TASKS["busi"])
    described, lines = choose("auto", TASKS["busi"])
    assert described == [] and "pip install segment-anything" in lines[0]


def test_of_several_files_that_of_the_modality_is_taken(files):
    oct_images = dataclasses.replace(TASKS["busi"], modality="retinal OCT")
    for variant in ("mae_natureOCT", "mae_natureCFP"):
        (files / f"RETFound_{variant}.pth").touch()
        for task in (oct_images, TASKS["busi"], TASKS["aptos2019"]):
            (found,) = choose("auto", task)[0]
            own = "mae_natureOCT" if task is oct_images else "mae_natureCFP"
            assert found["variant"] == (own if (files / f"RETFound_{own}.pth").exists() else variant)
    assert names("retfound_mae_natureOCT") == ["retfound_mae_natureOCT"]


def test_a_data_set_of_ones_own_gets_what_its_kind_needs(files):
    (files / OFFICIAL["biomedparse"]).touch()
    own = dataclasses.replace(TASKS["busi"], classes=("background", "rim", "lesion"), prompts=(), source=None)
    (found,), _ = choose("auto", own)
    assert found["prompts"] == ["rim in ultrasound", "lesion in ultrasound"] and found["grid_limit"] == own.grid_limit
    assert "only if they were public" in seen(entry("biomedparse"), own)
    (found,), _ = choose("auto", dataclasses.replace(own, kind="classification"))
    assert found["prompts"] == []
    (found,), _ = choose("auto", dataclasses.replace(own, teacher_options={"biomedparse": {"prompts": ["a", "b"]}}))
    assert found["prompts"] == ["a", "b"]


def test_the_page_says_of_every_pair_what_the_data_set_says():
    page = (ROOT / "docs" / "teachers.md").read_text()
    rows = re.search(r"\| teacher \| BUSI.*\n\|.*\n((?:\|.*\n)+)", page)[1].splitlines()
    cells = {row.split("|")[1].split()[0].lower(): [c.strip() for c in row.split("|")[2:-1]] for row in reversed(rows)}
    tasks = ("busi", "kvasir_seg", "covid", "msd_heart", "aptos2019", "isic2017")
    for kind in FOUNDATION:
        told = [seen(entry(kind), TASKS[task]).split(";")[0] for task in tasks]
        assert told == [*cells[kind]], kind


def test_crews_are_chosen_by_word():
    chosen, lines = choose("crew_small", TASKS["busi"])
    assert chosen == [{"name": "crew", "kind": "crew", "size": "small"}] and not lines
    assert choose(["crew"], TASKS["busi"])[0][0]["size"] == "default"
