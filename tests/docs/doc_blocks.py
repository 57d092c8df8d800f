"""What the documentation tells its reader to type, taken apart."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("bundles/*/docs/README.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
STARTS = r"(?:python -m (?:amkd_monai|monai\.bundle)|torchrun|make|pip install|python \w+/[\w/]+\.py)"
COMMAND = re.compile(rf"(?:^|\s){STARTS}(?= |$).*")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def block_commands(page: Path) -> list[list[str]]:
    """Every command of the project in the bash blocks, as words; continued lines are joined."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found += [words(match) for match in COMMAND.findall(line)]
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Commands between backticks and in indented blocks, which may leave arguments out."""
    text = FENCE.sub("", page.read_text())
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [words(match) for span in spans for match in COMMAND.findall(span)]


def inline_options(page: Path) -> list[str]:
    """Names of options between backticks, `--name value` or `--name#part value`."""
    return re.findall(r"`--([\w-]+)", FENCE.sub("", page.read_text()))


def words(command: str) -> list[str]:
    """Split a command, without comments and what follows on the same line."""
    split = shlex.split(re.sub(r"\s#.*", "", command))
    end = next((i for i, word in enumerate(split) if word in (";", "|", "&&")), len(split))
    return split[:end]
