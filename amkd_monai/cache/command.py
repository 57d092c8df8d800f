"""Options of ``cache``; what needs torch is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_cache_commands(commands: Any) -> None:
    """Add ``cache`` with its own commands to the subparsers of the command line."""
    cache = commands.add_parser("cache", help="stored outputs of teachers: list, verify, prune, export, build")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")

    status = actions.add_parser("status", help="which stores there are, their sizes, complete or not")
    status.add_argument("folder", nargs="?", default="bundles/.cache", help="cache_dir (default: %(default)s)")
    status.set_defaults(run=_status)

    verify = actions.add_parser("verify", help="check all hashes, and run teachers again on a sample of the images")
    verify.add_argument("folder", nargs="?", default="bundles/.cache", help="cache_dir, or one store")
    verify.add_argument("--fraction", type=float, default=0.01, help="of the images (default: %(default)s, at least 1)")
    verify.add_argument("--device", default="cpu", help="where teachers run (default: %(default)s)")
    verify.add_argument("--weights_dir", help="folder of weight files")
    verify.set_defaults(run=_verify)

    prune = actions.add_parser("prune", help="remove stores that are damaged, incomplete or stale")
    prune.add_argument("folder", nargs="?", default="bundles/.cache", help="cache_dir (default: %(default)s)")
    prune.add_argument("--dry_run", action="store_true", help="only list them")
    prune.set_defaults(run=_prune)

    export = actions.add_parser("export", help="copy one store for publication, without paths of weights")
    export.add_argument("store", help="folder of the store, from `cache status`")
    export.add_argument("--to", required=True, help="folder to make")
    export.set_defaults(run=_export)

    build = actions.add_parser("build", help="run the teachers of a bundle, as its training would")
    build.add_argument("bundle", help="training bundle, such as bundles/kvasir_seg")
    build.add_argument("--shard", help="compute one part, 1/8 to 8/8 (default: all, or this rank's under torchrun)")
    build.add_argument("--batch_size", type=int, help="images per forward, halved when memory runs out")
    build.add_argument("--config", action="append", default=[], help="config on top of train.json, such as teachers")
    build.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run, such as views=4"
    )
    build.set_defaults(run=_build)


def _status(arguments: argparse.Namespace) -> int:
    from amkd_monai.cache.inventory import find_stores, format_stores

    print(format_stores(find_stores(arguments.folder), arguments.folder))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from amkd_monai.cache.inventory import find_stores
    from amkd_monai.cache.verify import verify_store

    found = find_stores(arguments.folder)
    wrong = 0
    for entry in found:
        if entry.state == "stale":
            print(entry.fault)
            continue
        faults, how = [entry.fault], "not opened"
        if entry.store is not None:
            faults, how = verify_store(entry.store, arguments.fraction, arguments.device, arguments.weights_dir)
        wrong += bool(faults)
        print(f"{entry.directory}: {'FAULTY' if faults else 'good'}, {entry.state} ({how})")
        for fault in faults:
            print(f"  {fault}")
    print(f"{len(found)} stores, {wrong} faulty")
    return 1 if wrong else 0


def _prune(arguments: argparse.Namespace) -> int:
    from amkd_monai.cache.inventory import find_stores, prune, useless

    found = find_stores(arguments.folder)
    reasons = useless(found)
    for entry in found:
        if entry.directory in reasons:
            print(f"{entry.directory} ({entry.size / 1e6:.1f} MB): {reasons[entry.directory]}")
    if not arguments.dry_run:
        prune(reasons)
    freed = sum(entry.size for entry in found if entry.directory in reasons) / 1e6
    print(f"{len(reasons)} of {len(found)} stores {'would be' if arguments.dry_run else 'are'} removed, {freed:.1f} MB")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from amkd_monai.cache.store import export_store

    print(f"exported to {export_store(arguments.store, arguments.to)}")
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from amkd_monai.cache.parts import Part
    from amkd_monai.export.command import settings_of

    part = Part.from_environment() if arguments.shard is None else Part.parse(arguments.shard)
    settings = settings_of(arguments.set)
    from amkd_monai.engines.prepare import build_cache
    from amkd_monai.memory import own_peak

    for directory in build_cache(arguments.bundle, settings, arguments.config, part, arguments.batch_size):
        print(directory)
    print(f"peak memory of this process: {own_peak():.0f} MB", file=sys.stderr)
    return 0
