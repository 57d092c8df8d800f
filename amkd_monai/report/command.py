"""The command ``report``."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    report = commands.add_parser("report", help="one HTML page that shows what runs did")
    report.add_argument("runs", nargs="+", help="output folders of runs of one task; the first is the reference")
    report.add_argument("--output", default="report.html", help="file to write (default: report.html)")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from amkd_monai.report.page import write_report

    print(write_report(arguments.runs, arguments.output))
    return 0
