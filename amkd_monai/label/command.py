"""Options of ``label``; everything is checked before MONAI Label is imported."""

from __future__ import annotations

import argparse
import importlib.util
import socket
from pathlib import Path
from typing import Any

DEFAULT_WORK = ".label"


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    label = commands.add_parser("label", help="serve trained students to 3D Slicer and OHIF by MONAI Label")
    label.add_argument("--bundles", nargs="+", required=True, help="names in bundles/, or folders of trained bundles")
    label.add_argument("--studies", required=True, help="folder of images, or http(s) address of a DICOMweb server")
    label.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    label.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    label.add_argument(
        "--work",
        default=DEFAULT_WORK,
        help="folder for the copies that are fine-tuned, and logs (default: %(default)s)",
    )
    label.set_defaults(run=_label)


def _label(arguments: argparse.Namespace) -> int:
    from amkd_monai.label.workplace import claimed, find_bundles, prepare

    bundles = find_bundles(arguments.bundles)
    is_address = arguments.studies.startswith(("http://", "https://"))
    if not is_address and not Path(arguments.studies).is_dir():
        raise FileNotFoundError(f"There is no folder {arguments.studies}: give --studies a folder of images.")
    if importlib.util.find_spec("monailabel") is None:
        raise RuntimeError(
            "MONAI Label is not installed in this environment: run `make label-env`, then start this command with "
            ".venv-label/bin/python."
        )
    _check_port(arguments.host, arguments.port)
    with claimed(Path(arguments.work)):
        work = prepare(bundles, Path(arguments.work))
        from amkd_monai.label.server import serve

        serve(work, arguments.studies, arguments.host, arguments.port)
    return 0


def _check_port(host: str, port: int) -> None:
    """Raise one sentence if the port is taken, before ten seconds of imports."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"Port {port} of {host} cannot be used ({error}): give another --port or --host.") from error
