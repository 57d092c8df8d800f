"""The command line prints tables, and errors as one sentence."""

from __future__ import annotations

import pytest

from amkd_monai.__main__ import main
from amkd_monai.errors import root_cause
from amkd_monai.metrics.summary import write_case_csv


def write_run(folder, dices):
    folder.mkdir(parents=True)
    rows = [{"id": f"c{i}", "class": "polyp", "label": 1, "status": "ok", "dice": d} for i, d in enumerate(dices)]
    for row in rows:
        row |= {"iou": row["dice"] / 2, "nsd": 0.5, "hd95": 3.0, "pred_volume": 1.0, "reference_volume": 1.0}
    write_case_csv(folder / "per_case.csv", rows)
    return folder


def test_teachers_prints_the_table(capsys):
    assert main(["teachers"]) == 0
    out = capsys.readouterr().out
    assert "ImageNet EfficientNet-Lite1" in out and "usable" in out and "CC BY-NC 4.0" in out


def test_compare_keeps_runs_of_equal_folder_names_apart(tmp_path, capsys):
    reference = write_run(tmp_path / "a" / "eval", [0.5, 0.6, 0.7, 0.65])
    better = write_run(tmp_path / "b" / "eval", [0.6, 0.7, 0.8, 0.7])
    worse = write_run(tmp_path / "c" / "eval", [0.4, 0.5, 0.6, 0.6])
    assert main(["compare", str(reference), str(better), str(worse)]) == 0
    out = capsys.readouterr().out
    assert str(better) in out and str(worse) in out
    assert "0.0875" in out.replace("+", ""), "mean of .1, .1, .1, .05"


def test_a_missing_run_is_one_sentence_and_exit_code_1(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "x"), str(tmp_path / "y")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path / "x") in error


def test_an_unknown_command_is_refused():
    with pytest.raises(SystemExit) as caught:
        main(["fly"])
    assert caught.value.code == 2


def test_the_root_cause_is_the_outermost_sentence_of_this_package():
    from amkd_monai.data.datasets import get_task

    def read():
        raise OSError("low-level words")

    try:
        try:
            try:
                read()
            except OSError as error:
                get_task_error = error
                try:
                    get_task("no_such_task")
                except ValueError as own:
                    raise own from get_task_error
        except ValueError as own:
            raise RuntimeError("words of a framework") from own
    except RuntimeError as wrapped:
        assert "no_such_task" in str(root_cause(wrapped))
