"""What the documentation shows can be typed: Python runs, JSON fits, commands are understood."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from command_check import all_options, check
from doc_blocks import PAGES, block_commands, blocks, inline_commands, inline_options, words
from helpers import ROOT

from amkd_monai.teachers.base import KINDS, bound, validate_descriptions

WITH = {language: [p for p in PAGES if blocks(p, language)] for language in ("python", "json", "bash")}
OF_BENCHMARKS = {"minutes", "shared", "table"}


def name(page):
    return str(page.relative_to(ROOT))


def test_there_is_something_to_check():
    assert len(PAGES) > 12 and len(WITH["bash"]) > 8 and len(WITH["python"]) > 1 and len(WITH["json"]) > 1
    assert sum(len(block_commands(page)) for page in PAGES) > 50


@pytest.mark.parametrize("page", WITH["python"], ids=name)
def test_python_runs(page):
    for text in blocks(page, "python"):
        exec(compile(text, name(page), "exec"), {"__name__": "shown"})


@pytest.mark.parametrize("page", WITH["json"], ids=name)
def test_json_is_read_and_its_teachers_are_known(page):
    for text in blocks(page, "json"):
        shown = json.loads(text)
        teachers = shown.get("teachers", [shown] if "kind" in shown else [])
        validate_descriptions(teachers)
        for teacher in teachers:
            if teacher["kind"] in KINDS:
                bound(teacher)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_understood(page):
    for command in block_commands(page):
        check(command)
    for command in inline_commands(page):
        check(command, whole=False)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_named_in_the_text_exist(page):
    assert set(inline_options(page)) - all_options() - OF_BENCHMARKS == set()


def test_files_and_tests_named_in_the_text_exist():
    files = list((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in files} | {n for f in files for n in re.findall(r"def (test_\w+)", f.read_text())}
    text = "\n".join(page.read_text() for page in (ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")))
    named = set(re.findall(r"\b((?:tests|benchmarks|docs/tools)/[\w/]+\.(?:py|sh))\b", text))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    assert set(re.findall(r"\b(test_\w*[a-z0-9])\b", text)) - tests == set()


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_lead_to_files_and_headings(tmp_path, monkeypatch):
    links = tool("links")
    assert {page.name for page in links.PAGES} >= {"README.md", "method.md", "first_student.ipynb", "CONTRIBUTING.md"}
    assert [problem for page in links.PAGES for problem in links.missing(page)] == []
    monkeypatch.setattr(links, "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# A, b & c?\n## Twice\n## Twice\n[x](#twice)")
    wrong = ["b.md#a", "b.md#a-b-c", "b.md#twice-1", "c.md", "../b.md", "#x"]
    (tmp_path / "a.md").write_text("[good](b.md) `[code](d.md)`\n" + "".join(f"![x]({target})\n" for target in wrong))
    assert len(list(links.missing(tmp_path / "a.md"))) == len(wrong) and not list(links.missing(tmp_path / "b.md"))


def test_figures_of_gains_show_the_rows_of_their_pages():
    module = tool("gain_figure")
    for page, rows, columns in (("results", 11, 1), ("ablation", 13, 2)):
        series = module.gains(ROOT / "docs" / f"{page}.md")
        assert len(series) == columns and all(len(values) >= rows for values in series.values())
        for gain, low, high in (found for values in series.values() for found in values.values()):
            assert low <= gain <= high
        labels = [text.get_text() for text in module.draw(series).axes[0].get_yticklabels()]
        drawn = (ROOT / "docs" / f"{page}.svg").read_text()
        assert labels and all(label in drawn for label in labels)


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        "pip install '.[everything]'",
        "python -m amkd_monai fly",
        "python -m amkd_monai export bundles/busi",
        "python -m amkd_monai compare a b --metrics dice",
        "python -m monai.bundle run training --config_file bundles/busi/configs/trian.json",
        "python -m monai.bundle run training --config_file bundles/busi/configs/train.json --image_sise 64",
        "python -m monai.bundle run training --config_file bundles/busi/configs/train.json --admission#mood all",
        "python -m monai.bundle run tarining --config_file bundles/busi/configs/train.json",
        "python benchmarks/results.py --jobbs 2",
    ],
)
def test_a_wrong_command_would_be_found(command, capsys):
    with pytest.raises(ValueError):
        check(words(command))
