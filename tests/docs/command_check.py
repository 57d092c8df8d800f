"""Whether a command of the documentation would be understood: its parser, its configs, its options."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from configparser import ConfigParser
from typing import Any

from helpers import ROOT
from monai.bundle import scripts
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from amkd_monai.__main__ import parser

TORCHRUN = {"--standalone", "--nproc_per_node"}


def check(words: list[str], whole: bool = True) -> None:
    """Raise a ValueError that says what is wrong; ``whole`` commands must have all their arguments."""
    text = " ".join(words)
    if words[0] == "torchrun" and "-m" in words:
        start = words.index("-m")
        if unknown := {word.split("=")[0] for word in words[1:start]} - TORCHRUN:
            raise ValueError(f"{text}: torchrun has no {unknown}")
        words = ["python", *words[start:]]
    if words[0] == "make":
        known = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if missing := set(words[1:]) - set(known):
            raise ValueError(f"{text}: no target {missing}")
    elif words[0] == "pip":
        _check_extras(text)
    elif words[:3] == ["python", "-m", "amkd_monai"]:
        _check_own(words[3:], whole)
    elif words[:3] == ["python", "-m", "monai.bundle"]:
        if whole or len(words) > 3:
            _check_bundle(words[3], words[4:])
    elif words[0] == "python":
        _check_script(words[1], [word for word in words if word.startswith("--")])


def _check_extras(text: str) -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\.\[(\w+)\]", text):
        if extra not in config["options.extras_require"]:
            raise ValueError(f"{text}: no extra {extra}")


def _check_own(words: list[str], whole: bool) -> None:
    is_synopsis = any(word.startswith("[") for word in words)
    if whole and not is_synopsis:
        try:
            parser().parse_args(words)
        except SystemExit:
            raise ValueError(f"not understood: {' '.join(words)}") from None
        return
    leaf = parser()
    for word in words:
        commands = next((a for a in leaf._actions if isinstance(a, argparse._SubParsersAction)), None)
        if commands is None:
            break
        if word not in commands.choices:
            raise ValueError(f"no command {word} in {' '.join(words)}")
        leaf = commands.choices[word]
    for word in words:
        option = word.strip("[]")
        if option.startswith("--") and option not in leaf._option_string_actions:
            raise ValueError(f"no option {option} in {' '.join(words)}")


def _check_bundle(command: str, words: list[str]) -> None:
    known = set(inspect.signature(getattr(scripts, command)).parameters)
    options = {word[2:]: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
    run_id = words[0] if words and not words[0].startswith("--") else "run"
    files = _files(options["config_file"]) if "config_file" in options else []
    config: dict[str, Any] = {}
    for file in files:
        config |= json.loads((ROOT / file).read_text())
    if command == "run" and run_id not in config:
        raise ValueError(f"{files} have no {run_id}")
    known |= config.keys() | tracking_keys(options.get("tracking"))
    for option in options:
        name, _, part = option.partition("#")
        if name not in known:
            raise ValueError(f"no setting {name} in {files}")
        if part and config[name] and part.split("#")[0] not in config[name]:
            raise ValueError(f"no setting {option} in {files}")
    if "meta_file" in options and not (ROOT / options["meta_file"]).is_file():
        raise ValueError(f"there is no {options['meta_file']}")


def _files(value: str) -> list[str]:
    """The configs named; a file of the user's own is one without a folder, a bundle of the user's own is `mybundle`."""
    named = ast.literal_eval(value) if value.startswith("[") else [value]
    named = [name.replace("bundles/mybundle/", "bundles/kvasir_seg/") for name in named]
    files = [f"bundles/kvasir_seg/{name}" if name.startswith("configs/") else name for name in named if "/" in name]
    if missing := [file for file in files if not (ROOT / file).is_file()]:
        raise ValueError(f"there is no {missing}")
    return files


def tracking_keys(tracking: str | None) -> set[str]:
    """Settings that a choice of tracking brings in."""
    if tracking is None:
        return set()
    settings = DEFAULT_MLFLOW_SETTINGS if tracking == "mlflow" else json.loads((ROOT / tracking).read_text())
    return set(settings["configs"])


def _check_script(file: str, options: list[str]) -> None:
    text = "".join(path.read_text() for path in (ROOT / file, ROOT / "benchmarks" / "bundle_runner.py"))
    if missing := [option for option in options if f'"{option}"' not in text]:
        raise ValueError(f"{file} has no {missing}")


def all_options() -> set[str]:
    """Every option that some command of the project or of MONAI's bundles takes."""
    known = set(inspect.signature(scripts.run).parameters) | set(DEFAULT_MLFLOW_SETTINGS["configs"])
    for path in ROOT.glob("bundles/*/configs/*.json"):
        known |= {key.partition("#")[0] for key in json.loads(path.read_text())}

    def walk(level: argparse.ArgumentParser) -> None:
        for action in level._actions:
            known.update(option[2:] for option in action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    walk(below)

    walk(parser())
    return known
