"""What the documentation shows can be typed: Python runs, JSON fits, commands are understood."""

from __future__ import annotations

import inspect
import json

import pytest
from command_check import all_options, check
from doc_blocks import PAGES, block_commands, blocks, inline_commands, inline_options, words
from helpers import ROOT

from amkd_monai.teachers.base import KINDS, teacher_class, validate_descriptions

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
                options = {k: v for k, v in teacher.items() if k != "kind"}
                inspect.signature(teacher_class(teacher["kind"])).bind(**options)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_understood(page):
    for command in block_commands(page):
        check(command)
    for command in inline_commands(page):
        check(command, whole=False)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_named_in_the_text_exist(page):
    assert set(inline_options(page)) - all_options() - OF_BENCHMARKS == set()


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
