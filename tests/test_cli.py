"""The command line: tables, errors as one sentence, --quiet and --verbose everywhere, progress on a terminal only."""

from __future__ import annotations

import argparse
import io
import logging
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from amkd_monai.cache.store import ArraySpec, FeatureStore, build_missing
from amkd_monai.cli import main, parser
from amkd_monai.errors import root_cause
from amkd_monai.metrics.summary import write_case_csv
from amkd_monai.terminal import is_quiet, progress, set_verbosity


class Terminal(io.StringIO):
    """An error stream that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before():
    handlers = list(logging.getLogger().handlers)
    yield
    set_verbosity("normal")
    logging.getLogger().handlers[:] = handlers


def leaves(top, words=()):
    """The words of every command, {words: parser}."""
    nested = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        return {words: top}
    found = {}
    for name, below in nested[0].choices.items():
        found |= leaves(below, (*words, name))
    return found


COMMANDS = leaves(parser())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_both_options(words):
    text = COMMANDS[words].format_help()
    assert "--quiet" in text and "--verbose" in text


@pytest.mark.parametrize(
    "words", [["--quiet", "cache", "status"], ["cache", "--quiet", "status"], ["cache", "status", "--quiet"]]
)
def test_the_place_of_the_option_does_not_matter(words):
    assert parser().parse_args(words).verbosity == "quiet"


def test_both_at_once_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["teachers", "--quiet", "--verbose"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([1, 2], desc="decode")) == [1, 2] and "decode: 100%" in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    assert list(progress([1, 2], desc="decode")) == [1, 2] and plain.getvalue() == ""


def test_quiet_silences_progress_and_keeps_warnings_and_results(monkeypatch, tmp_path, caplog, capsys):
    set_verbosity("quiet")
    assert is_quiet()
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    assert list(progress([1, 2], desc="decode")) == [1, 2]
    store = FeatureStore.create_or_open(tmp_path / "teacher-1", {}, ["a"], ["hash"], {"grid": ArraySpec((1, 1, 1))})
    build_missing(store, lambda view, shard, report: {"grid": np.ones((1, 1, 1, 1))}, title="teacher")
    assert stream.getvalue() == ""
    logging.getLogger("amkd_monai").info("a step")
    logging.getLogger("amkd_monai.data").warning("a warning")
    assert caplog.messages == ["a warning"]
    assert main(["cache", "status", str(tmp_path), "--quiet"]) == 0 and capsys.readouterr().out.strip()
    set_verbosity("normal")
    assert not is_quiet()


def test_verbose_shows_where_an_error_came_from(tmp_path, caplog, capsys):
    missing = str(tmp_path / "missing")
    assert main(["report", missing]) == 1 and "Traceback" not in caplog.text
    assert main(["report", missing, "--verbose"]) == 1
    assert "Traceback" in caplog.text and "page.py" in caplog.text
    assert capsys.readouterr().err.count("error: ") == 2


def test_debug_messages_reach_the_error_stream_and_those_of_others_do_not():
    code = (
        "import logging; from amkd_monai.terminal import set_verbosity; set_verbosity('verbose'); "
        "logging.getLogger('amkd_monai').debug('ours'); logging.getLogger('other').debug('theirs')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "amkd_monai DEBUG: ours" in done.stderr and "theirs" not in done.stderr and done.stdout == ""


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
