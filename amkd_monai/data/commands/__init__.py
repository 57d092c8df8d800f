"""The commands `data check` and `data fetch`."""

from __future__ import annotations

import argparse
import json


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `data` with its own commands to a command line."""
    data = commands.add_parser("data", help="look at a data set, or fetch it")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")

    check = actions.add_parser("check", help="counts, sizes, classes, duplicates, all problems, and a contact sheet")
    check.add_argument("name", help="task, e.g. busi")
    check.add_argument("--dataset_dir", help="the data set's folder (default: as in a training)")
    check.add_argument("--cache_dir", default="data", help="keeps hashes; phantoms are made there if there are no data")
    check.add_argument(
        "--data_options", type=json.loads, help="JSON, as in the bundle's config: '{\"normals\": false}'"
    )
    check.add_argument("--fold", type=int, default=0, help="of the split, where the data set is cross-validated")
    check.add_argument("--split_seed", type=int, default=0, help="of the split")
    check.add_argument(
        "--mask_codes", type=_codes, help="what the values of masks mean, as in the bundle's config (default: its rule)"
    )
    check.add_argument("--sheet", help="PNG of thumbnails to write (default: <name>_contact_sheet.png)")
    check.set_defaults(run=_check)

    fetch = actions.add_parser("fetch", help="download a data set, or print how to get it")
    fetch.add_argument("name", help="data set, e.g. msd_heart")
    fetch.add_argument("--to", default="data", help="folder in which the data set's folder is made (default: data)")
    fetch.set_defaults(run=_fetch)


def _codes(text: str) -> str | dict[str, int | str]:
    return json.loads(text) if text.startswith("{") else text


def _check(arguments: argparse.Namespace) -> int:
    from amkd_monai.data.commands.check import check_data
    from amkd_monai.data.commands.contact_sheet import write_contact_sheet
    from amkd_monai.data.datalist import resolve_dataset_dir

    root, _ = resolve_dataset_dir(arguments.name, arguments.dataset_dir, arguments.cache_dir)
    report = check_data(
        arguments.name,
        root,
        arguments.cache_dir,
        arguments.data_options,
        arguments.fold,
        arguments.split_seed,
        arguments.mask_codes,
    )
    print(report)
    usable = [item for item in report.items if not report.is_damaged(item)]
    if usable:
        sheet = arguments.sheet or f"{arguments.name}_contact_sheet.png"
        print(f"contact sheet: {write_contact_sheet(sheet, report.task, usable, mask_codes=arguments.mask_codes)}")
    return 1 if report.problems else 0


def _fetch(arguments: argparse.Namespace) -> int:
    from amkd_monai.data.commands.fetch import fetch, steps
    from amkd_monai.data.datasets import get_task

    folder, source = fetch(arguments.name, arguments.to), get_task(arguments.name).source
    if folder is None or source is None:
        print(steps(arguments.name))
    else:
        print(f"{folder} is complete. Terms: {source.terms}")
    return 0
