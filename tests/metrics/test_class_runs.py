"""From class probabilities to a report, and from two reports to a paired comparison."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from amkd_monai.__main__ import main
from amkd_monai.data.datasets import get_task
from amkd_monai.metrics.classification import class_metrics, class_row, delong_test
from amkd_monai.metrics.compare import compare_runs
from amkd_monai.metrics.summary import format_table, summarise_classes, write_case_csv

ISIC, APTOS = get_task("isic2017"), get_task("aptos2019")


def rows_of(task, seed=0, n=60, signal=1.5):
    rng = np.random.default_rng(seed)
    classes = len(task.classes)
    z = np.random.default_rng(99).normal(size=(n, classes)) + rng.normal(size=(n, classes)) * 0.5
    rows = []
    for i in range(n):
        p = np.exp(z[i] + signal * np.eye(classes)[i % classes])
        rows.append(class_row(task, f"c{i}", i % classes, p / p.sum()))
    return rows


def write_run(folder, task, rows):
    folder.mkdir(parents=True)
    write_case_csv(folder / "per_case.csv", rows)
    (folder / "metrics.json").write_text(json.dumps({"task": task.name}))
    return folder


def test_a_report_names_its_metrics_primary_first_with_intervals_around_the_values():
    for task, others in (
        (ISIC, {"melanoma_auc", "seborrheic_keratosis_auc", "melanoma_specificity_at_82", "macro_auroc", "ece"}),
        (APTOS, {"macro_auroc", "balanced_accuracy", "referable_sensitivity", "referable_specificity", "brier"}),
    ):
        summary = summarise_classes(rows_of(task), task)
        assert next(iter(summary["metrics"])) == task.primary_metric
        assert others <= set(summary["metrics"])
        for name, values in summary["metrics"].items():
            if name != "ece":  # resampling adds to it
                assert values["ci_low"] <= values["value"] <= values["ci_high"], name
                assert values["ci_low"] < values["ci_high"]
        assert sum(summary["classes"].values()) == 60 and np.sum(summary["confusion"]) == 60
        assert task.primary_metric in format_table(summary, "title")


def test_the_primary_metric_of_lesions_is_the_mean_of_two_areas():
    rows = rows_of(ISIC)
    label = np.array([r["label"] for r in rows])
    areas = [
        roc_auc_score(label == c, [r[k] for r in rows]) for c, k in ((1, "p_melanoma"), (2, "p_seborrheic_keratosis"))
    ]
    assert summarise_classes(rows, ISIC)["metrics"]["mean_auc"]["value"] == pytest.approx(np.mean(areas))


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.5, 0.6, 0.1], [np.nan, 0.5, 0.5], [-0.1, 0.6, 0.5]])
def test_what_are_no_probabilities_is_refused(p):
    with pytest.raises(ValueError, match="3 probabilities with sum 1"):
        class_row(ISIC, "c", 0, p)


def test_runs_are_compared_by_delong_and_by_bootstrap(tmp_path):
    weak, strong = rows_of(ISIC, 1, signal=0.3), rows_of(ISIC, 2, signal=3.0)
    for name, rows in (("weak", weak), ("strong", strong)):
        write_run(tmp_path / name, ISIC, rows)
    files = {n: tmp_path / n / "per_case.csv" for n in ("weak", "strong")}
    mean, melanoma, keratosis = compare_runs(files["weak"], {"strong": files["strong"]}, task=ISIC)
    assert (mean["test"], melanoma["test"], keratosis["test"]) == ("bootstrap", "DeLong", "DeLong")
    label = np.array([r["label"] for r in weak])
    expected = delong_test(label == 1, [r["p_melanoma"] for r in strong], [r["p_melanoma"] for r in weak])
    assert (melanoma["difference"], melanoma["ci_low"], melanoma["ci_high"], melanoma["p"]) == pytest.approx(expected)
    assert mean["difference"] > 0.1 and mean["ci_low"] > 0 and mean["p"] < 0.01 and mean["p_holm"] >= mean["p"]
    (same,) = compare_runs(files["weak"], {"weak": files["weak"]}, "ece", ISIC)
    assert same["difference"] == 0 and same["p"] == 1


def test_a_primary_metric_that_is_a_single_area_is_one_test_of_the_family(tmp_path):
    described = {"name": "two", "classes": ["a", "b"], "kind": "classification", "singled_out": ["b"]}
    task, rng = get_task({**described, "primary_metric": "b_auc"}), np.random.default_rng(0)
    for name in ("x", "y"):
        rows = [class_row(task, f"c{i}", i % 2, p) for i, p in enumerate(rng.dirichlet([1, 1], 40))]
        write_run(tmp_path / name, task, rows)
    (row,) = compare_runs(tmp_path / "x" / "per_case.csv", {"y": tmp_path / "y" / "per_case.csv"}, task=task)
    assert row["test"] == "DeLong" and row["p"] == row["p_holm"] < 1


def test_the_command_finds_the_task_and_prints_the_comparison(tmp_path, capsys):
    a = write_run(tmp_path / "a", APTOS, rows_of(APTOS, 1))
    b = write_run(tmp_path / "b", APTOS, rows_of(APTOS, 2, signal=3.0))
    assert main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "qwk" in out and "referable_auc" in out and "aptos2019" in out
    assert main(["compare", str(a), str(b), "--metric", "dice"]) == 1
    assert "There is no metric 'dice'" in capsys.readouterr().err


def test_runs_on_other_cases_or_labels_are_not_paired(tmp_path):
    rows = rows_of(ISIC)
    files = {}
    relabelled = [{**r, "label": 0, "class": "nevus"} if r["id"] == "c1" else r for r in rows]
    for name, content in (("all", rows), ("fewer", rows[1:]), ("relabelled", relabelled)):
        files[name] = write_run(tmp_path / name, ISIC, content) / "per_case.csv"
    with pytest.raises(ValueError, match=r"c0"):
        compare_runs(files["all"], {"x": files["fewer"]}, task=ISIC)
    with pytest.raises(ValueError, match="other labels than the reference for c1"):
        compare_runs(files["all"], {"x": files["relabelled"]}, task=ISIC)


def test_every_classification_task_has_its_primary_metric():
    for task in (ISIC, APTOS):
        assert task.primary_metric in class_metrics(task)
