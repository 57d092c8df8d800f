"""Paired comparison of case files."""

import math

import numpy as np
import pytest
from scipy import stats

from amkd_monai.metrics.compare import compare_runs, format_comparison
from amkd_monai.metrics.statistics import bootstrap_ci
from amkd_monai.metrics.summary import write_case_csv

RNG = np.random.default_rng(11)
BASE = RNG.beta(6, 1.5, size=40)


def case_file(path, values, classes=("polyp",), names=None):
    names = names or [f"case_{n}" for n in range(len(values))]
    rows = [
        {"id": name, "class": c, "status": "ok", "dice": float(value)}
        for name, value in zip(names, values, strict=True)
        for c in classes
    ]
    write_case_csv(path, rows)
    return path


def test_pairs_by_case_whatever_the_order(tmp_path):
    better = np.clip(BASE + RNG.normal(0.03, 0.01, 40), 0, 1)
    order = RNG.permutation(40)
    reference = case_file(tmp_path / "student.csv", BASE)
    shuffled = case_file(tmp_path / "kd.csv", better[order], names=[f"case_{n}" for n in order])
    (row,) = compare_runs(reference, {"gated": shuffled})
    assert (row["name"], row["class"], row["n"], row["left_out"]) == ("gated", "polyp", 40, 0)
    assert (row["reference_mean"], row["mean"]) == pytest.approx((BASE.mean(), better.mean()))
    assert (row["difference"], row["ci_low"], row["ci_high"]) == pytest.approx(bootstrap_ci(np.subtract(better, BASE)))
    assert row["p"] == row["p_holm"] == pytest.approx(stats.wilcoxon(better, BASE).pvalue)
    assert row["ci_low"] > 0 > row["p"] - 0.05


def test_holm_over_all_runs_and_classes(tmp_path):
    reference = case_file(tmp_path / "a.csv", BASE, ("polyp", "tool"))
    runs = {
        name: case_file(tmp_path / f"{name}.csv", BASE + RNG.normal(shift, 0.05, 40), ("polyp", "tool"))
        for name, shift in (("uniform", 0.01), ("gated", 0.03))
    }
    rows = compare_runs(reference, runs)
    assert [(row["name"], row["class"]) for row in rows] == [(n, c) for n in runs for c in ("polyp", "tool")]
    smallest = min(rows, key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(4 * smallest["p"])
    assert all(row["p_holm"] >= row["p"] for row in rows)
    table = format_comparison(rows, "against the undistilled student")
    assert len(table.splitlines()) == 6
    assert "gated tool" in table


def test_pairs_without_a_value_are_left_out_and_counted(tmp_path):
    other = BASE + 0.01
    other[3] = math.nan
    (row,) = compare_runs(case_file(tmp_path / "a.csv", BASE), {"x": case_file(tmp_path / "b.csv", other)})
    assert (row["n"], row["left_out"]) == (39, 1)
    assert row["reference_mean"] == pytest.approx(np.delete(BASE, 3).mean())


def test_a_run_against_itself(tmp_path):
    path = case_file(tmp_path / "a.csv", BASE)
    (row,) = compare_runs(path, {"same": path})
    assert (row["difference"], row["ci_low"], row["ci_high"], row["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_runs_on_other_labels_are_refused(tmp_path):
    files = [tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv"]
    for file, volume in zip(files, (261.0, 261.01, 317.0), strict=True):  # rounding, another mask
        row = {"id": "001", "class": "polyp", "status": "ok", "dice": 0.5, "reference_volume": volume}
        write_case_csv(file, [row, {**row, "id": "002", "reference_volume": 100.0}])
    (row,) = compare_runs(files[0], {"same": files[1]})
    assert row["n"] == 2
    with pytest.raises(ValueError, match=r"other labels.*1 case.*001 polyp"):
        compare_runs(files[0], {"other": files[2]})


def test_errors(tmp_path):
    reference = case_file(tmp_path / "a.csv", BASE[:9])
    fewer = case_file(tmp_path / "b.csv", BASE[:3], names=["case_0", "case_1", "other"])
    with pytest.raises(ValueError) as error:
        compare_runs(reference, {"few": fewer})
    assert "'few'" in str(error.value) and "8 case" in str(error.value) and "case_2 polyp" in str(error.value)
    with pytest.raises(ValueError, match=r"a.csv has no column auc; it has id, class, status, dice"):
        compare_runs(reference, {}, metric="auc")
    twice = case_file(tmp_path / "c.csv", BASE[:2], names=["x", "x"])
    with pytest.raises(ValueError, match=r"c.csv has two rows for the case x polyp"):
        compare_runs(twice, {})
    (tmp_path / "empty.csv").write_text("id,class,dice\n")
    with pytest.raises(ValueError, match=r"empty.csv holds no cases"):
        compare_runs(tmp_path / "empty.csv", {})
    assert compare_runs(reference, {}) == []
