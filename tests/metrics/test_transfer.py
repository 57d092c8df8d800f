"""The table of a shared student: scores, paired differences, their mean over tasks."""

from __future__ import annotations

import csv
import io
import json

import pytest

from amkd_monai.data.datasets import TASKS
from amkd_monai.metrics.compare import compare_runs, format_transfer, transfer_csv, transfer_rows
from amkd_monai.metrics.summary import summarise, write_case_csv

MASKS = {name: TASKS[name] for name in ("busi", "covid")}


def evaluated(folder, task, dices):
    """Write the evaluation of one task as a case report does."""
    rows = [
        {"id": f"c{i}", "class": "lesion", "status": "ok", "dice": d, "iou": d, "nsd": d, "hd95": 1.0}
        for i, d in enumerate(dices)
    ]
    write_case_csv(folder / "per_case.csv", rows)
    (folder / "metrics.json").write_text(json.dumps({"task": task, "summary": summarise(rows)}))
    return folder


@pytest.fixture
def shared(tmp_path):
    high, low = [0.8, 0.9, 0.7, 0.85, 0.6], [0.5, 0.4, 0.6, 0.3, 0.55]
    evaluated(tmp_path / "alone" / "busi", "busi", low)
    evaluated(tmp_path / "alone" / "covid", "covid", high)
    evaluated(tmp_path / "once" / "covid", "covid", high)
    return {
        "busi": evaluated(tmp_path / "shared" / "busi", "busi", high),
        "covid": evaluated(tmp_path / "shared" / "covid", "covid", low),
    }


def test_gain_and_loss_both_show(shared, tmp_path):
    rows = transfer_rows(shared, MASKS, {"alone": f"{tmp_path}/alone/{{task}}", "once": f"{tmp_path}/once/{{task}}"})
    by_place = {(r["task"], r["run"]): r for r in rows}
    assert list(by_place) == [
        ("busi", "shared"),
        ("busi", "alone"),
        ("covid", "shared"),
        ("covid", "alone"),
        ("covid", "once"),
        ("mean of 2", "alone"),
        ("mean of 1", "once"),
    ]
    gain, loss = by_place["busi", "alone"], by_place["covid", "alone"]
    assert gain["delta"] == pytest.approx(0.3) and loss["delta"] == pytest.approx(-0.3)
    (reference,) = compare_runs(tmp_path / "alone" / "busi" / "per_case.csv", {"s": shared["busi"] / "per_case.csv"})
    assert (gain["delta_ci_low"], gain["p"]) == (reference["ci_low"], reference["p"])
    assert gain["p_holm"] >= gain["p"] and by_place["mean of 2", "alone"]["delta"] == pytest.approx(0)
    assert by_place["busi", "shared"]["value"] == pytest.approx(0.77) and "delta" not in by_place["busi", "shared"]
    assert len(list(csv.DictReader(io.StringIO(transfer_csv(rows))))) == len(rows)
    assert "-0.3000 [" in format_transfer(rows) and "+0.3000 [" in format_transfer(rows)


def test_a_folder_that_is_no_evaluation_of_the_task_is_refused(shared, tmp_path):
    with pytest.raises(ValueError, match="no evaluation of busi"):
        transfer_rows({"busi": shared["covid"]}, MASKS, {})
    (tmp_path / "other" / "busi").mkdir(parents=True)
    with pytest.raises(ValueError, match="correct `compare`"):
        transfer_rows({"busi": shared["busi"]}, MASKS, {"other": f"{tmp_path}/other/{{task}}"})
    with pytest.raises(ValueError, match="compare#typo"):
        transfer_rows({"busi": shared["busi"]}, MASKS, {"typo": f"{tmp_path}/tipo/{{task}}"})
