"""Command line: ``python -m amkd_monai <command>``. Heavy imports happen inside commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from amkd_monai.terminal import CommandParser, logger, print_any_name, set_verbosity


def _teachers(arguments: argparse.Namespace) -> int:
    from amkd_monai.teachers.catalogue import format_catalogue

    print(format_catalogue(arguments.weights_dir))
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from amkd_monai.teachers.catalogue import entry

    teacher = entry(arguments.teacher)
    if not teacher.hub:
        raise ValueError(f"{teacher.name} cannot be fetched from here: get it by hand ({teacher.source}).")
    from amkd_monai.teachers.catalogue import fetch

    print(f"{fetch(teacher.hub, teacher.hub_files)} (licence: {teacher.licence})")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from amkd_monai.metrics.compare import compare_runs, evaluated_task, format_comparison

    reference = Path(arguments.reference) / "per_case.csv"
    others = {run: Path(run) / "per_case.csv" for run in arguments.runs}
    task = evaluated_task(Path(arguments.reference) / "metrics.json")
    rows = compare_runs(reference, others, arguments.metric, task)
    title = task.name if task is not None and task.is_classification else arguments.metric or "dice"
    print(format_comparison(rows, f"{title}, compared with {arguments.reference}"))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    import amkd_monai
    from amkd_monai.data.commands import add_commands

    top = CommandParser(prog="python -m amkd_monai", description=amkd_monai.__doc__)
    top.add_argument("--version", action="version", version=amkd_monai.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    teachers = commands.add_parser("teachers", help="which teachers are usable here, and how to get the others")
    teachers.add_argument("--weights_dir", help="folder of weight files (default: $AMKD_WEIGHTS, then weights/)")
    teachers.set_defaults(run=_teachers)

    fetch = commands.add_parser("fetch", help="download a teacher's weights from the Hugging Face hub")
    fetch.add_argument("teacher", help="medsam, retfound, retfound_mae_natureOCT, ...")
    fetch.set_defaults(run=_fetch)

    compare = commands.add_parser("compare", help="compare evaluated runs, paired by case")
    compare.add_argument("reference", help="output folder of the reference run (with per_case.csv)")
    compare.add_argument("runs", nargs="+", help="output folders of the runs to compare with it")
    compare.add_argument("--metric", help="masks: dice (default), iou, nsd, hd95; classes: one of metrics.json")
    compare.set_defaults(run=_compare)

    add_commands(commands)

    from amkd_monai.cache.command import add_cache_commands as add_cache
    from amkd_monai.export.command import add_parsers
    from amkd_monai.label.command import add_parser as add_label
    from amkd_monai.report.command import add_parser as add_report

    add_parsers(commands)
    add_label(commands)
    add_report(commands)
    add_cache(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an expected error is printed as one sentence and gives exit code 1."""
    print_any_name()
    arguments = parser().parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, str) and value.startswith("~"):  # --option=~/folder, which no shell expands
            setattr(arguments, name, str(Path(value).expanduser()))
    set_verbosity(getattr(arguments, "verbosity", "normal"))
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        logger.debug("The command ended with an error.", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
