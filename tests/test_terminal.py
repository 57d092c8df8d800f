"""Every command takes --quiet and --verbose; progress is shown on a terminal, and never when it isn't wanted."""

from __future__ import annotations

import argparse
import io
import logging
import subprocess
import sys

import pytest
from helpers import ROOT

from amkd_monai.__main__ import main, parser
from amkd_monai.cache.parts import progress_line
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
    with progress_line("teacher", 2, 0) as bar:
        bar.update(2)
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
    assert "Traceback" in caplog.text and "run_folder.py" in caplog.text
    assert capsys.readouterr().err.count("error: ") == 2


def test_debug_messages_reach_the_error_stream_and_those_of_others_do_not():
    code = (
        "import logging; from amkd_monai.terminal import set_verbosity; set_verbosity('verbose'); "
        "logging.getLogger('amkd_monai').debug('ours'); logging.getLogger('other').debug('theirs')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "amkd_monai DEBUG: ours" in done.stderr and "theirs" not in done.stderr and done.stdout == ""
