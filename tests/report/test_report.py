"""The page shows what the run's files say, needs nothing but itself, and says what a run lacks."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers import ROOT, without

sys.path.insert(0, str(ROOT / "tests" / "bundles"))
from bundle_runs import run, settings
from nibabel import orientations
from scipy import ndimage

from amkd_monai.__main__ import main
from amkd_monai.data.datasets import get_task
from amkd_monai.files.pictures import class_colours
from amkd_monai.metrics.classification import class_row
from amkd_monai.metrics.run_folder import failures, outcomes
from amkd_monai.metrics.segmentation import METRICS, mask_rows
from amkd_monai.metrics.summary import figures_of, preview_file, write_figures
from amkd_monai.report.figures import roc
from amkd_monai.report.page import write_report
from amkd_monai.report.previews import PLANES, mask_preview, save_arrays
from amkd_monai.storage import file_sha256

TEACHER = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, students):
    """Trained and evaluated runs on phantoms: polyps with and without a teacher, a volume, classes."""
    root = tmp_path_factory.mktemp("runs")
    for name, task in (("undistilled", "kvasir_seg"), ("heart", "msd_heart")):
        shutil.copytree(students(task)[0] / "eval", root / name / "eval")
    for name, bundle in (("polyps", "kvasir_seg"), ("skin", "isic2017")):
        values = settings(bundle, root / name, root / "cache", teachers=TEACHER, admission={"mode": "all"})
        run(bundle, ("train",), values)
        run(bundle, ("train", "evaluate"), values)
    return {name: root / name / "eval" for name in ("polyps", "undistilled", "heart", "skin")}


def test_several_classes_are_told_apart(tmp_path):
    """A case is one case with all its classes; figures, colours and words are of each class."""
    description = {"name": "three", "classes": ["background", "lesion", "rim"], "regions": {"whole": [1, 2]}}
    task, rng, rows = get_task(description), np.random.default_rng(0), []
    for case in ("a", "b"):
        masks = [ndimage.zoom(rng.integers(0, 3, (4, 5)), 8, order=0) for _ in range(2)]
        if case == "b":
            masks[0][masks[0] == 2], masks[1][masks[1] == 2] = 0, 0
        rows += mask_rows(task, case, *masks, (1, 1))
        arrays = {
            "image": np.zeros((1, 32, 40, 3), np.uint8),
            "reference": masks[1][None],
            "prediction": masks[0][None],
        }
        save_arrays(preview_file(tmp_path, case), {k: a.astype(np.uint8) for k, a in arrays.items()})
    write_figures(tmp_path, rows, figures_of(task, rows, {}), task.identity)
    page = Page(write_report([tmp_path], tmp_path / "report.html"))
    text = " ".join(page.text.split())
    dices = {(row["id"], row["class"]): row["dice"] for row in rows}
    assert f"lesion: Dice {dices['a', 'lesion']:.3f}" in text and f"rim: Dice {dices['a', 'rim']:.3f}" in text
    assert f"lesion: Dice {dices['b', 'lesion']:.3f}" in text and "rim: empty both" in text
    shown = dict(re.findall(r'data-metric="[^"]*/([^"]*)">([^<]*)<', page.source))
    assert shown["rim dice"] == f"{dices['a', 'rim']:.3f}"
    assert shown["whole dice"] == f"{(dices['a', 'whole'] + dices['b', 'whole']) / 2:.3f}"
    lesion_and_rim = (dices["a", "lesion"] + dices["a", "rim"]) / 2
    assert shown["dice"] == f"{(lesion_and_rim + dices['b', 'lesion']) / 2:.3f}"
    assert "with background dice" in shown
    alts = [tag["alt"] for name, tag in page.tags if name == "img"]
    assert len(alts) == 6 and len(set(alts)) == 6, "image, reference and student of each of two cases"
    for colour in class_colours([1, 2]).tolist():
        assert f"background:#{bytes(colour).hex()}" in page.source


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.source = "", path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data + " "


@pytest.mark.parametrize("name", ["polyps", "heart", "skin"])
def test_an_evaluation_makes_a_page_that_needs_nothing_else(name, runs):
    file = runs[name] / "report.html"
    page, text = Page(file), file.read_text()
    assert file.stat().st_size < 15e6
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<link|fetch\(", text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) >= 4 and all(a["alt"].strip() for a in images)
    assert "PHANTOM DATA" in page.text
    assert [tag for tag, a in page.tags if tag == "input" and a.get("type") == "range"] if name == "heart" else True


@pytest.mark.parametrize("name", ["polyps", "heart", "skin"])
def test_numbers_are_those_of_the_evaluation(name, runs):
    text = (runs[name] / "report.html").read_text()
    metrics = json.loads((runs[name] / "metrics.json").read_text())["summary"]["metrics"]
    shown = dict(re.findall(r'data-metric="[^"]*/(\w+)">([^<]*)<', text))
    assert shown.keys() == metrics.keys()
    for metric, values in metrics.items():
        assert float(shown[metric]) == pytest.approx(values.get("mean", values.get("value")), abs=5.1e-4)


def test_a_mask_on_the_page_lies_where_the_file_says(runs):
    from amkd_monai.metrics.summary import preview_file, read_case_csv

    for case in read_case_csv(runs["polyps"] / "per_case.csv"):
        with np.load(preview_file(runs["polyps"], case["id"])) as preview:
            reference, prediction = preview["reference"] > 0, preview["prediction"] > 0
            assert preview["image"].shape[:3] == reference.shape
        dice = 2 * (reference & prediction).sum() / (reference.sum() + prediction.sum())
        assert dice == pytest.approx(case["dice"], abs=0.05)


def test_teachers_are_shown_with_their_weights(runs):
    with np.load(runs["polyps"] / "teachers.npz") as kept:
        assert {"image", "label", "student", "answer_lite1", "weight_lite1", "ids"} == set(kept.files)
        assert 0 < kept["weight_lite1"].mean() <= 255 and kept["student"].std() > 0
    page = Page(runs["polyps"] / "report.html")
    assert "output of lite1" in page.text and "weight of lite1" in page.text


def test_the_figures_of_the_method_show_a_run(runs, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("method_figure", ROOT / "docs" / "tools" / "method_figure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DOCS", tmp_path)
    module.main(runs["polyps"])
    drawn = (tmp_path / "method_run.svg").read_text()
    assert (
        all(word in drawn for word in ("lite1", "abstention", "task")) and (tmp_path / "method_teachers.jpg").is_file()
    )
    with pytest.raises(ValueError, match="with teachers"):
        module.main(runs["undistilled"])


def test_runs_side_by_side_are_compared_with_the_first(runs, tmp_path, capsys):
    output = tmp_path / "both.html"
    assert main(["report", str(runs["undistilled"]), str(runs["polyps"]), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    page = Page(output)
    assert "Compared with undistilled" in page.text and "p (Holm)" in page.text
    dices = [
        json.loads((runs[n] / "metrics.json").read_text())["summary"]["metrics"]["dice"]
        for n in ("undistilled", "polyps")
    ]
    gain = dices[1]["mean"] - dices[0]["mean"]
    assert f"student (undistilled): Dice, polyp {gain:+.3f}" in page.text and "also differ" not in page.text
    assert page.text.count("not measured") == 0
    swapped = Page(write_report([runs["polyps"], runs["undistilled"]], tmp_path / "swapped.html"))
    assert swapped.text.count("not measured") == 1, "the first run is no undistilled student"


def test_a_run_says_what_it_lacks_and_still_has_a_page(runs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(runs["polyps"], broken)
    for name in ("metrics.json", "per_case.csv"):
        (broken / name).unlink()
    record = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps(record | {"status": "running", "epochs_done": 1}))
    lines = (broken / "history.csv").read_text().splitlines()
    (broken / "history.csv").write_text("\n".join(lines[:2]) + "\n")
    text = Page(write_report([broken], tmp_path / "page.html")).text
    for words in ("was not evaluated", "stopped after epoch 1", "one epoch"):
        assert words in text
    both = Page(write_report([broken, runs["undistilled"]], tmp_path / "two.html")).text
    assert "cannot be compared" in both


def test_scores_without_a_value_are_dashes(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs["polyps"], other)
    report = json.loads((other / "metrics.json").read_text())
    report["summary"]["metrics"]["dice"] = {"mean": None, "ci_low": None, "ci_high": None, "median": None, "n": 0}
    (other / "metrics.json").write_text(json.dumps(report))
    header, *rows = (other / "per_case.csv").read_text().splitlines()
    places = [header.split(",").index(c) for c in ("status", "dice", "iou", "nsd", "hd95")]
    for i, row in enumerate(rows):
        cells = row.split(",")
        for place, value in zip(places, ("empty_both", "nan", "nan", "nan", "nan"), strict=True):
            cells[place] = value
        rows[i] = ",".join(cells)
    (other / "per_case.csv").write_text("\n".join([header, *rows]) + "\n")
    text = write_report([other], tmp_path / "page.html").read_text()
    assert re.search(r'/dice">-<', text) and "empty_both" in text


def test_data_that_stand_in_for_others_are_named_in_large_letters(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs["polyps"], other)
    for name, note in (("run.json", "pigs <in place of> people"), ("metrics.json", "other pigs")):
        content = json.loads((other / name).read_text())
        content["data"] |= {"phantom": False, "stand_in": note}
        (other / name).write_text(json.dumps(content))
    file = write_report([other, runs["polyps"]], tmp_path / "page.html")
    text = Page(file).text
    assert "STAND-IN DATA: pigs <in place of> people" in text and "STAND-IN DATA: other pigs" in text
    assert text.count("PHANTOM DATA") == 1 and text.count("Trained on Kvasir-SEG") == 2
    assert "<in place of>" not in file.read_text()


def test_wrong_folders_are_refused_in_one_sentence(runs, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "neither run.json nor metrics.json" in capsys.readouterr().err
    assert main(["report", str(runs["polyps"]), str(runs["heart"])]) == 1
    assert "different tasks" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(runs["polyps"], damaged)
    (damaged / "metrics.json").write_text("{")
    assert main(["report", str(damaged)]) == 1
    assert "is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["polyps", "heart", "skin"])
def test_the_page_is_read_from_the_verdict_down(name, runs):
    text = Page(runs[name] / "report.html").text
    places = [
        text.index(words) for words in ("95 % interval", "Cases: best", "Failures:", "Validation score", "split hash")
    ]
    assert places == sorted(places)
    record = json.loads((runs[name] / "run.json").read_text())
    metrics = json.loads((runs[name] / "metrics.json").read_text())
    size = " x ".join(map(str, record["image_size"]))
    kept = (metrics["student_sha256"], record["written"], metrics["written"], f"{size} pixels", "best validation")
    assert all(words in text for words in kept)
    assert record["written"] <= metrics["written"]
    for unit in () if name == "skin" else (("HD95 (mm)", "2 mm") if name == "heart" else ("HD95 (px)", "2 px")):
        assert unit in text


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_a_case_is_best_median_or_worst_once(count, tmp_path):
    task, rows = get_task("kvasir_seg"), []
    for i in range(count):
        masks = np.zeros((2, 32, 40), np.uint8)
        masks[0, : i + 1, :9] = masks[1, :30, :9] = 1
        rows += mask_rows(task, f"case {i:02}", *masks, (1, 1))
        arrays = {"image": np.zeros((1, 32, 40, 3), np.uint8), "reference": masks[1:], "prediction": masks[:1]}
        save_arrays(preview_file(tmp_path, f"case {i:02}"), arrays)
    write_figures(tmp_path, rows, figures_of(task, rows, {}), task.identity)
    source = write_report([tmp_path], tmp_path / "report.html").read_text()
    shown = re.findall(r'class="tag">(\w+)</span> case (\d+)', source)
    parts = {part: [int(i) for p, i in shown if p == part] for part in ("best", "median", "worst")}
    assert len({i for _, i in shown}) == len(shown) == min(count, 12) if count not in (1, 7) else shown
    if count == 1:
        assert shown == [("only", "00")]
        return
    assert (parts["median"] != []) == (count > 2)
    assert max(parts["worst"]) < min(parts["median"] or parts["best"]) and parts["best"][0] == count - 1
    assert max(parts["median"] or [0]) < min(parts["best"])


def rows_with(dices, empty=0):
    values = [("ok", d, 10.0) for d in dices] + [("empty_both", np.nan, 0.0)] * empty
    shared = {"class": "polyp", "label": 1, "pred_volume": 10.0}
    return [
        {"id": f"c{i}", "status": status, "reference_volume": size, **shared, **dict.fromkeys(METRICS, dice)}
        for i, (status, dice, size) in enumerate(values)
    ]


def written(folder, rows, record=None, **facts):
    task = get_task("kvasir_seg")
    write_figures(folder, rows, figures_of(task, rows, {}), {"data": {"counts": {"test": 99}}, **facts})
    if record is not None:
        data = {**task.identity, "root": "x", "counts": {"train": 12, "unlabelled": 5}, "split_hash": folder.name}
        known = {"status": "completed", "epochs_done": 1, "max_epochs": 1, "cpu_seconds": 1, "peak_rss_mb": 1}
        (folder / "run.json").write_text(json.dumps({"data": data, "student_parameters": 1, **known, **record}))
    return folder


def test_the_page_counts_what_was_used(tmp_path):
    student = tmp_path / "model.pt"
    student.write_bytes(b"one")
    teacher = {"name": "crew", "kind": "crew", "outputs_admitted": True, "features_admitted": True}
    teacher |= {"admission_reason": "", "fingerprint": ""}
    more = {"unlabelled": {"images": 786}, "skipped_samples": {"train": ["broken 7"], "validation": []}}
    rows, facts = rows_with([0.9, 0.8, 0.7], 22), {"student": str(student), "student_sha256": file_sha256(student)}
    alone = written(tmp_path / "alone", rows, more | {"distillation": "none"}, **facts)
    taught = written(tmp_path / "taught", rows, more | {"distillation": {"teachers": [teacher]}}, **facts)
    first, second = (Page(write_report([folder], tmp_path / "page.html")).text for folder in (alone, taught))
    for text in (first, second):
        assert "0.900, 3 cases" in text and "Scored on 25 test cases" in text and "only 3 cases" in text
        assert "broken 7" in text and "earlier student" not in text
    assert "12 labelled images" in first and "12 labelled and 791 unlabelled images" in second
    student.write_bytes(b"resumed")
    assert "earlier student" in Page(write_report([taught], tmp_path / "page.html")).text


def test_a_gain_without_an_interval_shows_none_and_other_data_are_named(tmp_path):
    teacher = {"name": "t", "kind": "timm", "outputs_admitted": True, "features_admitted": True}
    taught = {"distillation": {"teachers": [{**teacher, "admission_reason": "", "fingerprint": ""}]}}
    alone = written(tmp_path / "alone", rows_with([0.5]), {"distillation": "none"})
    folders = [alone, written(tmp_path / "taught", rows_with([0.6]), taught)]
    text = Page(write_report(folders, tmp_path / "page.html")).text
    assert "shows no gain" in text and "also differ in training data." in text


def test_thirty_classes_have_curves():
    assert ">k29<" in roc({f"k{i}": (np.array([True, False]), np.array([0.9, 0.1])) for i in range(30)})


def test_figures_of_the_docs_show_missed_cases_and_gains_on_their_side(tmp_path):
    case, gain = (runpy.run_path(str(ROOT / "docs" / "tools" / f"{n}_figure.py")) for n in ("case", "gain"))
    rows = rows_with([0.9, 0.5, 0.0], 1)
    rows[2]["status"] = "missed"
    written(tmp_path, rows, data={"phantom": True})
    assert case["cases_of"](tmp_path) == [("c1", 0.5, "median"), ("c2", 0.0, "worst")]
    (axes,) = gain["draw"]({"gain": {"up": (0.5, 0.4, 0.6), "down": (-0.5, -0.6, -0.4)}}).axes
    assert {text.get_text().strip("◀▶ "): text.get_position()[0] > 0 for text in axes.texts} == {
        "+0.500": True,
        "-0.500": False,
    }


def test_failures_are_listed_from_the_worst_on():
    polyps, grades = get_task("kvasir_seg"), get_task("aptos2019")
    square, rows = np.zeros((8, 8), np.uint8), []
    square[:4, :4] = 1
    for case, found, true in (
        ("good", square, square),
        ("low", square, np.roll(square, 3)),
        ("missed", 0 * square, square),
        ("false", square, 0 * square),
        ("empty", 0 * square, 0 * square),
    ):
        rows += mask_rows(polyps, case, found, true, (1, 1))
    assert [cells[:2] for cells in failures(polyps, rows)] == [
        ("false", "polyp: false positive"),
        ("missed", "polyp: missed"),
        ("low", "polyp: low Dice"),
    ]
    assert "missed: 1" in outcomes(rows) and "Empty references: 2, false positives on them: 1" in outcomes(rows)
    answers = {"right": [0.1, 0.9, 0, 0, 0], "unsure": [0.6, 0.4, 0, 0, 0], "sure": [0.9, 0.1, 0, 0, 0]}
    listed = failures(grades, [class_row(grades, case, 1, p) for case, p in answers.items()])
    assert [cells[0] for cells in listed] == ["sure", "unsure"] and "0.90" in listed[0][2]


def test_a_page_that_would_be_too_large_shows_fewer_slices(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("amkd_monai.report.page.LARGEST", 1)
    source = write_report([runs["heart"]], tmp_path / "page.html").read_text()
    assert set(re.findall(r'type="range"[^>]* max="(\d+)"', source)) == {"2"}


def test_planes_of_a_volume_stand_as_radiologists_look_at_them(tmp_path):
    """Whatever the axes of the file, a block at the patient's right, front and top lies left, up and up."""
    for axes in ("RAS", "LPS", "SAR", "PIL"):
        order = orientations.ornt_transform(
            orientations.axcodes2ornt(tuple("RAS")), orientations.axcodes2ornt(tuple(axes))
        )
        volume = np.random.default_rng(0).normal(100, 1, (20, 24, 10)).astype(np.float32)
        mask = np.zeros(volume.shape, np.uint8)
        mask[15:18, 19:22, 7:9] = 1
        affine = np.diag([1.0, 1.0, 3.0, 1.0]) @ orientations.inv_ornt_aff(order, volume.shape)
        turned = [orientations.apply_orientation(array, order) for array in (volume, mask)]
        nibabel.save(nibabel.Nifti1Image(turned[0], affine), tmp_path / "volume.nii.gz")
        preview = mask_preview(str(tmp_path / "volume.nii.gz"), turned[1], turned[1])
        centres = [np.argwhere(preview[f"reference{p}"]).mean(0) / preview[f"reference{p}"].shape for p in range(3)]
        for (down, across), name in zip(centres, PLANES, strict=True):
            assert down < 0.3, (axes, name)
            assert across < 0.3, (axes, name)
        assert [preview[f"plane{p}"].shape[:2] for p in range(3)] == [(30, 24), (30, 20), (24, 20)], "square pixels"
        assert preview["axis"] == 2 and preview["shape"].tolist() == [20, 24, 10]
        own = axes.index("S" if "S" in axes else "I")
        assert preview["numbers"].max() - preview["numbers"].min() == len(preview["image"]) - 1
        assert preview["at"][2] - 1 in np.argwhere(turned[1])[:, own]


def test_a_task_of_a_shared_student_has_the_record_of_their_run(runs, tmp_path):
    shared = tmp_path / "eval"
    shutil.copytree(runs["polyps"], shared / "kvasir_seg")
    record = json.loads((shared / "kvasir_seg" / "run.json").read_text())
    (shared / "kvasir_seg" / "run.json").unlink()
    header, *rows = (shared / "kvasir_seg" / "history.csv").read_text().splitlines()
    (shared / "kvasir_seg" / "history.csv").unlink()
    own = {"data": record.pop("data"), "distillation": record.pop("distillation"), "labelled_samples": 28}
    (shared / "run.json").write_text(json.dumps(record | {"tasks": {"kvasir_seg": own, "busi": {}}}))
    columns = [c if c in ("epoch", "learning_rate") else f"kvasir_seg/{c}" for c in header.split(",")]
    lines = [",".join([*columns, "busi/loss_total"]), *(f"{row},9" for row in rows)]
    (shared / "history.csv").write_text("\n".join(lines) + "\n")
    text = Page(write_report([shared / "kvasir_seg"], tmp_path / "page.html")).text
    assert "Trained on Kvasir-SEG" in text and "Distilled from lite1" in text and "Validation score" in text
    with pytest.raises(ValueError, match=str(shared / "busi")):
        write_report([shared], tmp_path / "page.html")


def test_teachers_that_were_not_admitted_have_not_taught_the_student(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["polyps"], folder)
    record = json.loads((folder / "run.json").read_text())
    (teacher,) = record["distillation"]["teachers"]
    assert "Distilled from lite1" in Page(write_report([folder], tmp_path / "page.html")).text
    teacher |= {"outputs_admitted": False, "features_admitted": False}
    (folder / "run.json").write_text(json.dumps(record))
    text = Page(write_report([folder], tmp_path / "page.html")).text
    assert "Distilled from" not in text and "Not distilled" in text and "Taught nothing: lite1." in text
    assert "Gain over" not in text


def test_a_browser_opens_the_page_without_complaint(runs, tmp_path):
    if shutil.which("chromium") is None:
        without("chromium", "install it")
    page = tmp_path / "page.html"
    text = (runs["heart"] / "report.html").read_text()
    clicks = """<script>addEventListener("load", function () {
      var button = document.querySelectorAll("table.sortable th button")[3];
      button.click();
      document.title = Array.prototype.map.call(document.querySelectorAll("table.sortable tbody tr"),
        function (row) { return row.cells[3].textContent; }).join(" ");
      var slider = document.querySelector("input[type=range]"), image = document.querySelector("img[data-frames]");
      var before = image.src; slider.value = 0; slider.dispatchEvent(new Event("input"));
      document.body.dataset.moved = image.src !== before;
      document.body.dataset.over = document.documentElement.scrollWidth - innerWidth; });</script></body>"""
    page.write_text(text.replace("</body>", clicks))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--dump-dom", "--window-size=400,900"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert 'data-moved="true"' in done.stdout
    dice = [float(x) for x in re.search(r"<title>([^<]*)</title>", done.stdout)[1].split()]
    assert dice == sorted(dice) and len(dice) >= 2
    assert int(re.search(r'data-over="(-?\d+)"', done.stdout)[1]) <= 0, "nothing is cut off at 400 px"
    assert "Uncaught" not in done.stderr
