"""Aggregation over cases, the text table, case files and JSON."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import case_metrics

from amkd_monai.metrics.statistics import bootstrap_ci
from amkd_monai.metrics.summary import format_table, read_case_csv, summarise, write_case_csv
from amkd_monai.storage import jsonable


def row(case, dice, status="ok", name="polyp", **more):
    return {"id": case, "class": name, "status": status, "dice": dice, **more}


def rows_of(images):
    """Rows of (pred, reference) pairs of 2D binary masks."""
    return [
        {"id": f"image_{n}", **case_metrics(pred, reference, 2, (1, 1), 2.0)[0]}
        for n, (pred, reference) in enumerate(images)
    ]


def disc(radius, center=(100, 100), size=200):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2).long()


def test_dice_is_per_image_and_not_pooled():
    """One large lesion found, one small missed, one false positive: pooled 0.97, per image a third of it."""
    nothing = torch.zeros(200, 200, dtype=torch.long)
    images = [(disc(80), disc(80, (102, 102))), (nothing, disc(5)), (disc(5), nothing)]
    pooled_pred, pooled_reference = (torch.stack(masks) for masks in zip(*images, strict=True))
    pooled = 2 * (pooled_pred & pooled_reference).sum() / (pooled_pred.sum() + pooled_reference.sum())
    assert pooled > 0.97

    rows = rows_of(images)
    found = rows[0]["dice"]
    assert found == pytest.approx(0.978, abs=0.003)
    summary = summarise(rows)
    dice = summary["metrics"]["dice"]
    assert dice["mean"] == pytest.approx(found / 2)  # the missed lesion weighs as much as the large one
    assert dice["n"] == 2
    assert summary["status"] == {"false_positive": 1, "missed": 1, "ok": 1}  # counted, not hidden in the mean
    assert summary["false_positive_rate"] == 1.0
    with_false_positives_as_zero = np.mean([found, 0, 0])
    assert with_false_positives_as_zero == pytest.approx(0.326, abs=0.002)
    assert summary["metrics"]["hd95"]["n"] == 1


def test_images_without_lesion_do_not_lift_the_mean():
    lesion = [(disc(30), disc(40)), (disc(28), disc(20))]
    nothing = torch.zeros(200, 200, dtype=torch.long)
    alone, among_normals = summarise(rows_of(lesion)), summarise(rows_of(lesion + [(nothing, nothing)] * 8))
    assert among_normals["metrics"] == alone["metrics"]
    assert among_normals["status"] == {"empty_both": 8, "ok": 2}
    assert among_normals["cases"] == 10
    assert among_normals["false_positive_rate"] == 0.0
    assert (among_normals["empty_references"], alone["empty_references"]) == (8, 0)
    assert format_table(among_normals, "t").splitlines()[-1] == (
        "empty references, in no mean above: 8, of which 0 with a false positive"
    )
    assert "empty references" not in format_table(alone, "t")
    assert math.isnan(alone["false_positive_rate"])


def test_interval_median_and_n():
    values = np.random.default_rng(0).random(25)
    rows = [row(str(n), float(value)) for n, value in enumerate(values)]
    rows.append(row("empty", math.nan, "empty_both"))
    dice = summarise(rows, ["dice"])["metrics"]["dice"]
    assert (dice["mean"], dice["ci_low"], dice["ci_high"]) == pytest.approx(bootstrap_ci(values))
    assert (dice["median"], dice["n"]) == (pytest.approx(np.median(values)), 25)


def test_the_case_is_the_unit_when_there_are_several_classes():
    rows = [
        row("a", 0.8),
        row("a", 0.4, name="tool"),
        row("b", 0.9),
        row("b", math.nan, "empty_both", "tool"),
    ]
    summary = summarise(rows, ["dice"])
    assert summary["metrics"]["dice"]["n"] == summary["cases"] == 2
    assert summary["metrics"]["dice"]["mean"] == pytest.approx((0.6 + 0.9) / 2)
    assert summary["classes"]["tool"]["metrics"]["dice"]["mean"] == 0.4
    assert summary["classes"]["tool"]["status"] == {"empty_both": 1, "ok": 1}
    assert "tool dice" in format_table(summary, "test")


def test_no_cases():
    summary = summarise([])
    assert summary["cases"] == 0
    assert summary["metrics"]["dice"]["n"] == 0
    assert math.isnan(summary["metrics"]["dice"]["mean"])


def test_errors_of_summarise():
    with pytest.raises(ValueError, match="Case 'a' has two rows for the class 'polyp'"):
        summarise([row("a", 0.1), row("a", 0.2)], ["dice"])


def test_table():
    rows = [row("a", 0.8), row("b", 0.6), row("c", 0.0, "missed")]
    lines = format_table(summarise(rows, ["dice"]), "Kvasir-SEG test").splitlines()
    assert lines[0] == "Kvasir-SEG test (3 cases; missed 1, ok 2)"
    assert lines[1].split() == ["mean", "95", "%", "CI", "median", "n"]
    assert lines[2].split() == ["dice", "0.4667", "[0.0000,", "0.8000]", "0.6000", "3"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert "[-, -]" in format_table(summarise(rows[:1], ["dice"]), "one")


def test_case_file_round_trip(tmp_path):
    rows = [
        {
            "id": "007",
            "class": 'left, "atrium"',
            "label": 1,
            "status": "ok",
            "dice": 0.1 + 0.2,
            "hd95": 1e-17,
        },
        {"id": "Ä b", "class": "x\ny", "label": 2, "status": "missed", "dice": 0.0, "hd95": math.nan},
    ]
    path = tmp_path / "new" / "per_case.csv"
    write_case_csv(path, rows)
    read = read_case_csv(path)
    np.testing.assert_equal(read, rows)
    assert [type(value) for value in read[0].values()] == [type(value) for value in rows[0].values()]
    assert path.read_bytes().startswith(b"id,class,label,status,dice,hd95\n007,")


def test_case_file_errors(tmp_path):
    path = tmp_path / "cases.csv"
    with pytest.raises(ValueError, match="no cases to write"):
        write_case_csv(path, [])
    assert not path.exists()
    path.write_text("id,dice\na,0.5\nb,high\n")
    with pytest.raises(ValueError, match=r"cases.csv, line 3.*'high'"):
        read_case_csv(path)
    path.write_text("id,dice\na\n")
    with pytest.raises(ValueError, match="line 2 does not have as many cells"):
        read_case_csv(path)
    with pytest.raises(FileNotFoundError):
        read_case_csv(tmp_path / "none.csv")


def test_jsonable(tmp_path):
    obj = {"a": np.float32(0.5), "b": [math.nan, math.inf, np.int64(3)], 4: (True, None, "x"), "p": tmp_path}
    obj["array"] = np.array([[1.0, np.nan]])
    expected = {
        "a": 0.5,
        "b": [None, None, 3],
        "4": [True, None, "x"],
        "p": str(tmp_path),
        "array": [[1.0, None]],
    }
    assert jsonable(obj) == expected
    assert json.loads(json.dumps(jsonable(obj), allow_nan=False)) == expected
    with pytest.raises(TypeError, match="Cannot write a Tensor as JSON"):
        jsonable({"x": torch.zeros(2)})
