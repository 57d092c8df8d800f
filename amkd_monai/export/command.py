"""Options of ``export`` and ``predict``; what they run is imported when it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_parsers(commands: Any) -> None:
    """Add both commands to the subparsers of the command line."""
    export = commands.add_parser("export", help="a trained student alone, in several formats, each checked")
    export.add_argument("bundle", help="training bundle, such as bundles/kvasir_seg")
    export.add_argument("--to", required=True, help="folder to make")
    export.add_argument(
        "--formats",
        default="ts,pt2,onnx,ort-int8",
        help="some of them, or openvino, openvino-int8 (default: %(default)s)",
    )
    export.add_argument("--overlay", default="", help="configs the run had on top, such as volumes of bundles/covid")
    export.add_argument("--accept-loss", action="store_true", help="keep 8 bits whatever they cost")
    export.add_argument("--cases", type=_positive, default=100, help="validation images to check on, at most")
    export.add_argument("--calibration", type=_positive, default=32, help="training images for 8 bits, at most")
    export.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting the run had, such as dataset_dir=FOLDER, ckpt_dir=FOLDER, output_dir=FOLDER, image_size=128",
    )
    export.set_defaults(run=_export)

    predict = commands.add_parser("predict", help="masks or classes by an exported student, without torch")
    predict.add_argument("input", help="image, volume, folder of them, or folder of a DICOM series")
    predict.add_argument("--model", required=True, help="folder that export made")
    predict.add_argument("--output", required=True, help="folder for the answers")
    predict.add_argument("--int8", action="store_true", help="use the network of 8 bits")
    predict.add_argument("--threads", type=_positive, help="threads of ONNX Runtime (default: its own choice)")
    predict.set_defaults(run=_predict)


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; a value is JSON, or else text.

    Raises:
        ValueError: a pair without ``=``.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair} is not understood: write --set KEY=VALUE.")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = str(Path(value).expanduser()) if value.startswith("~") else value
    return settings


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    settings, to = settings_of(arguments.set), Path(arguments.to).expanduser()
    if to.exists():
        raise FileExistsError(f"{to} is there already: remove it or give another folder.")
    from amkd_monai.export.formats import chosen_formats

    names = chosen_formats(arguments.formats)
    from amkd_monai.export.bundle import Options, export_bundle
    from amkd_monai.export.source import open_source

    options = Options(names, arguments.accept_loss, arguments.cases, arguments.calibration)
    written = export_bundle(open_source(Path(arguments.bundle).expanduser(), settings, arguments.overlay), to, options)
    print(f"exported to {written}; card: {written / 'docs' / 'README.md'}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from amkd_monai.export.predict import predict

    return predict(arguments.model, arguments.input, arguments.output, arguments.int8, arguments.threads)
