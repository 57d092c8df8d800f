"""How large the package is, how many of its files a training passes through, and what imports what.

    python benchmarks/house.py             # lines and imports: seconds
    python benchmarks/house.py --trip      # two steps of a training on phantoms as well: about a minute

Lines of code are lines with a token that is no comment or docstring. The trip counts files of the package of which a
function runs between the reading of a bundle's train.json and the second loss of its training: data set, decoding, a
teacher with its cache, probe and admission, batch, student and distiller. The phantoms are written before. What runs
at import does not count, nor do functions that dataclasses generate; handlers, the record of the run and messages are
counted on their own."""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import logging
import sys
import tempfile
import tokenize
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import grimp
import numpy as np
from importlinter.cli import lint_imports
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "amkd_monai"
CORE = ("distillation", "cache", "engines", "networks")
BESIDES = ("engines.handlers", "engines.runs", "data.seen", "errors", "terminal", "memory")
"""Modules that neither make a batch nor a teacher map nor the loss: handlers, the run's record, messages."""
TEACHERS = [{"name": "tiny", "kind": "timm", "model": "resnet10t", "weights": "random", "image_size": 64}]
SMALL = {"image_size": 64, "max_epochs": 1, "recipe#min_steps": 1, "teachers": TEACHERS, "num_workers": 0}


def lines(file: Path) -> Counter[str]:
    """Count all lines and lines of code of a file."""
    text = file.read_text(encoding="utf-8")
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            code |= set(range(token.start[0], token.end[0] + 1))
    return Counter(files=1, lines=text.count("\n"), code=len(code - documented))


def print_lines() -> None:
    """Print the size of each folder, of the core and of the package."""
    folders: dict[str, Counter[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).parts
        folders.setdefault(parts[0] if len(parts) > 1 else "top level", Counter()).update(lines(file))
    core = sum((folders[name] for name in CORE), Counter())
    total = sum(folders.values(), Counter())
    print(f"{'folder':<14} files   lines    code")
    for name, count in [*folders.items(), ("core", core), ("package", total)]:
        print(f"{name:<14} {count['files']:>5} {count['lines']:>7} {count['code']:>7}")
    print(f"core: {', '.join(CORE)}")


def print_imports() -> None:
    """Print modules that one other alone imports, circles, and the layers of pyproject.toml."""
    graph = grimp.build_graph(PACKAGE.name, exclude_type_checking_imports=True)
    modules = sorted(graph.modules - {PACKAGE.name})
    packages = {m for m in modules if graph.find_children(m)}
    importers = {m: graph.find_modules_that_directly_import(m) for m in modules if m not in packages}
    single = [module for module, by in importers.items() if len(by) == 1]
    print(f"\n{len(single)} of {len(importers)} modules are imported by exactly one other:")
    for module in single:
        print(f"  {module.partition('.')[2]} by {next(iter(importers[module])).partition('.')[2]}")
    index = {module: number for number, module in enumerate(modules)}
    adjacency = np.zeros((len(modules), len(modules)), bool)
    for module in modules:
        for imported in graph.find_modules_directly_imported_by(module) & index.keys():
            adjacency[index[module], index[imported]] = True
    _, labels = connected_components(adjacency, connection="strong")
    circles = [[m for m in modules if labels[index[m]] == label] for label, size in Counter(labels).items() if size > 1]
    print(f"{len(circles)} import circles {circles or ''}")
    print(
        f"upward imports: {'none' if lint_imports(config_filename=str(ROOT / 'pyproject.toml')) == 0 else 'see above'}"
    )


def trip(bundle: str) -> list[str]:
    """Return the modules whose functions run before the second loss of a training on phantoms, in order of first use.

    Nothing counts within an import, that is, from the call of a module's frame to its return.
    """
    from ignite.engine import Events
    from monai.bundle import ConfigParser, ConfigWorkflow

    from amkd_monai.data.datalist import resolve_dataset_dir

    files: dict[str, None] = {}
    importing: list[FrameType] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_name == "<module>" and code.co_filename.endswith(".py"):  # not an expression of a config
            if event == "call":
                importing.append(frame)
            elif event == "return" and frame in importing:
                del importing[importing.index(frame) :]
        elif event == "call" and not importing and code.co_flags & inspect.CO_OPTIMIZED:  # no class body
            files.setdefault(code.co_filename)

    configs = ROOT / "bundles" / bundle / "configs"
    with tempfile.TemporaryDirectory() as folder:
        places = {f"{name}_dir": f"{folder}/{name}" for name in ("output", "ckpt", "cache")}
        task = ConfigParser.load_config_file(configs / "train.json")["task"]
        data, _ = resolve_dataset_dir(task, cache_dir=folder)
        sys.setprofile(note)
        workflow = ConfigWorkflow(
            str(configs / "train.json"),
            str(configs / "metadata.json"),
            logging_file=False,
            workflow_type="train",
            bundle_root=str(configs.parent),
            dataset_dir=str(data),
            **places,
            **SMALL,
        )
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=2), lambda: (sys.setprofile(None), trainer.terminate())
        )
        try:
            workflow.run()
        finally:
            sys.setprofile(None)
    inside = [Path(file) for file in files if Path(file).is_relative_to(PACKAGE)]
    return [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in inside]


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trip", action="store_true", help="run two steps of a training")
    parser.add_argument("--bundle", default="kvasir_seg", help="whose train.json (default: %(default)s)")
    arguments = parser.parse_args()
    print_lines()
    print_imports()
    if arguments.trip:
        logging.disable(logging.WARNING)
        modules = trip(arguments.bundle)
        besides = [module for module in modules if module.startswith(BESIDES)]
        on_trip = [module for module in modules if module not in besides]
        print(
            f"\n{1 + len(on_trip)} files from config to loss, in order of first use: {arguments.bundle}/train.json and"
        )
        print("  " + "\n  ".join(on_trip))
        print(f"{len(besides)} more for handlers, the run's record and messages:\n  " + "\n  ".join(besides))


if __name__ == "__main__":
    main()
