"""Command line: ``python -m amkd_monai <command>``. A command imports what it runs when it runs."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import amkd_monai
from amkd_monai.errors import root_cause
from amkd_monai.terminal import logger, print_any_name, set_verbosity

CACHE = "bundles/.cache"
SETTING: dict[str, Any] = {"action": "extend", "nargs": "+", "default": [], "metavar": "KEY=VALUE"}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    verbosity = common.add_mutually_exclusive_group()
    # no default: the default of a sub-command would replace an option given before its name
    level: dict[str, Any] = {"action": "store_const", "dest": "verbosity", "default": argparse.SUPPRESS}
    verbosity.add_argument("--quiet", const="quiet", help="print results and warnings only", **level)
    verbosity.add_argument("--verbose", const="verbose", help="log every step, and errors with their trace", **level)
    top = argparse.ArgumentParser("python -m amkd_monai", description=amkd_monai.__doc__, parents=[common])
    top.add_argument("--version", action="version", version=amkd_monai.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str, to: Any = commands) -> Any:
        command = to.add_parser(name, help=text, parents=[common])
        command.set_defaults(run=run)
        return command

    def group(name: str, text: str) -> Any:
        parent = commands.add_parser(name, help=text, parents=[common])
        return parent.add_subparsers(dest="action", required=True, metavar="ACTION")

    teachers = add("teachers", _teachers, "list teachers usable here, or what those of a bundle would do and cost")
    teachers.add_argument("bundle", nargs="?", help="bundle, such as bundles/busi; runs each teacher on one image")
    teachers.add_argument("--weights_dir", help="folder of weight files (default: $AMKD_WEIGHTS, then weights/)")
    teachers.add_argument("--set", help="settings, after BUNDLE, such as teachers=foundation", **SETTING)

    fetch = add("fetch", _fetch, "download teacher weights from the Hugging Face hub")
    fetch.add_argument("teacher", help="medsam, retfound, retfound_mae_natureOCT, ...")

    compare = add("compare", _compare, "compare evaluated runs, paired by case")
    compare.add_argument("reference", help="output folder of the reference run (with per_case.csv)")
    compare.add_argument("runs", nargs="+", help="output folders of the runs to compare with it")
    compare.add_argument("--metric", help="masks: dice (default), iou, nsd, hd95; classes: one of metrics.json")

    new = add("new", _new, "write a bundle for your own data")
    new.add_argument("name", help="name of the bundle, such as mybundle")
    new.add_argument("--data", required=True, help="folder of the data")
    new.add_argument("--classes", help='names by label value, such as "background,tumour,necrosis"')
    new.add_argument("--groups", default="", help="groups no split cuts: a column, or a pattern such as '(p[0-9]+)_'")
    new.add_argument("--kind", default="", help="segmentation, classification or multilabel (default: from the labels)")
    new.add_argument("--modality", default="", help="how the images were made, such as ultrasound")
    new.add_argument("--to", default="bundles", help="folder of bundles (default: %(default)s)")

    data = group("data", "check or download a data set")
    check = add("check", _data_check, "list counts, sizes, duplicates and all problems; draw a sheet", data)
    check.add_argument("name", help="task, such as busi, or the folder of a bundle")
    check.add_argument("--dataset_dir", help="folder of the data set (default: as in training)")
    check.add_argument(
        "--cache_dir", help="folder for hashes, phantoms and sheet (default: bundles/.cache or the user's)"
    )
    check.add_argument("--data_options", type=json.loads, help="JSON, as in the bundle: '{\"normals\": false}'")
    check.add_argument("--folds", type=int, help="number of folds, in place of the data set's own sections")
    check.add_argument("--fold", type=int, help="fold of the split, for cross-validated data sets")
    check.add_argument("--split_seed", type=int, help="seed of the split")
    check.add_argument("--mask_codes", type=_codes, help="meaning of mask values (default: that of the bundle)")
    check.add_argument("--sheet", help="PNG file for thumbnails (default: contact_sheet.png in the cache)")
    fetch_data = add("fetch", _data_fetch, "download a data set, or print how to get it", data)
    fetch_data.add_argument("name", help="data set, such as msd_heart")
    fetch_data.add_argument("--to", default="data", help="parent of the data set's folder (default: %(default)s)")

    export = add("export", _export, "export a trained student in several formats, each checked")
    export.add_argument("bundle", help="training bundle, such as bundles/kvasir_seg")
    export.add_argument("--to", required=True, help="new folder to write")
    formats = "ts,pt2,onnx,ort-int8 (the default; no 8 bits of a 3D student), openvino, openvino-int8, web, hub, triton"
    export.add_argument("--formats", help=f"comma-separated: {formats}")
    export.add_argument("--web-runtime", help="file onnxruntime-web-VERSION.tgz, if npm has no network")
    export.add_argument("--accept-loss", action="store_true", help="keep 8 bits whatever accuracy they lose")
    export.add_argument("--cases", type=_positive, default=100, help="most validation images to check (default: 100)")
    export.add_argument("--calibration", type=_positive, default=32, help="images for 8 bits (default: %(default)s)")
    export.add_argument("--set", help="settings, after BUNDLE, such as ckpt_dir=FOLDER image_size=128", **SETTING)

    push = add("push", _push, "upload a student exported with --formats hub to the Hugging Face hub")
    push.add_argument("folder", help="folder written by export")
    push.add_argument("repository", help="OWNER/NAME on the hub, created if needed")
    push.add_argument("--public", action="store_true", help="make the repository public (default: private)")

    predict = add("predict", _predict, "predict masks or classes with an exported student, without torch")
    predict.add_argument("input", help="image, volume, folder of them, or folder of a DICOM series")
    predict.add_argument("--model", required=True, help="folder written by export")
    predict.add_argument("--output", required=True, help="folder for the predictions")
    predict.add_argument("--dicom-seg", action="store_true", help="also write a DICOM segmentation of a DICOM series")
    predict.add_argument("--dicom-captures", action="store_true", help="also write overlays of its slices as captures")

    evaluate = add("evaluate", _evaluate, "score a student on its test section, or on a folder of labelled data")
    evaluate.add_argument("bundle", help="trained bundle, such as bundles/kvasir_seg, or folder written by export")
    evaluate.add_argument("--data", help="folder of labelled data that the student has not seen")
    evaluate.add_argument("--output", help="folder for results (default: eval/on_<data folder> in the bundle)")
    evaluate.add_argument("--seen", choices=("refuse", "apart"), default="refuse", help="images of the training")
    evaluate.add_argument("--set", help="settings, after BUNDLE, such as ckpt_dir=FOLDER mask_codes=nonzero", **SETTING)

    score = add("score", _score, "score masks of any program against references")
    score.add_argument("predictions", help="folder of masks")
    score.add_argument("references", help="folder of reference masks of the same names")
    asked = score.add_mutually_exclusive_group(required=True)
    asked.add_argument("--task", help="task, such as busi, or a file that describes one")
    asked.add_argument("--classes", help="class names, background first: background,tumour,necrosis")
    score.add_argument("--output", required=True, help="folder for per_case.csv and metrics.json")
    score.add_argument("--nsd_tolerance", type=float, help="tolerance of NSD in px or mm (default: the task's, else 2)")
    for name in ("prediction", "reference"):
        score.add_argument(f"--{name}_codes", type=_codes, help=f"meaning of mask values of {name}s, as for mask_codes")

    label = add("label", _label, "serve trained students to 3D Slicer and OHIF through MONAI Label")
    label.add_argument("--bundles", nargs="+", required=True, help="names in bundles/, or folders of trained bundles")
    label.add_argument("--studies", required=True, help="folder of images, or http(s) address of a DICOMweb server")
    label.add_argument("--work", default=".label", help="folder for fine-tuned copies and logs (default: %(default)s)")

    served = add("serve", _serve, "serve an exported student over HTTP: its page, and POST /predict")
    served.add_argument("model", help="folder written by export")
    for command, port in ((label, 8000), (served, 8080)):
        command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
        command.add_argument("--port", type=int, default=port, help="port to listen on (default: %(default)s)")
    served.add_argument("--limit", type=_positive, default=200, help="largest upload in MB (default: %(default)s)")
    for command in (predict, evaluate, served):
        command.add_argument("--int8", action="store_true", help="use the 8-bit network of an exported student")
        command.add_argument("--threads", type=_positive, help="threads of ONNX Runtime (default: it chooses)")
    for command in (export, evaluate):
        command.add_argument("--overlay", default="", help="configs on top, such as volumes of bundles/covid")

    report = add("report", _report, "write one HTML page about one or several runs")
    report.add_argument("runs", nargs="+", help="output folders of runs of one task; the first is the reference")
    report.add_argument("--output", default="report.html", help="file to write (default: %(default)s)")

    cache = group("cache", "list, verify, prune or build stored teacher outputs")
    status = add("status", _cache_status, "list stores with sizes and completeness", cache)
    verify = add("verify", _cache_verify, "check all hashes, and whether the teachers are unchanged", cache)
    prune = add("prune", _cache_prune, "remove stores that are damaged, incomplete or stale", cache)
    for command in (status, verify, prune):
        command.add_argument("folder", nargs="?", default=CACHE, help="cache_dir, or one store (default: %(default)s)")
    verify.add_argument("--weights_dir", help="folder of weight files")
    prune.add_argument("--dry_run", action="store_true", help="list the stores, remove nothing")
    build = add("build", _cache_build, "run the teachers of a bundle ahead of its training", cache)
    build.add_argument("bundle", help="training bundle, such as bundles/kvasir_seg")
    build.add_argument("--shard", help="compute one part, such as 1/8 (default: all, or this rank's under torchrun)")
    build.add_argument("--batch_size", type=int, help="images per forward pass, halved when memory runs out")
    build.add_argument("--config", action="append", default=[], help="config on top, such as my_teachers.json")
    build.add_argument("--set", help="settings, after BUNDLE, such as views=4", **SETTING)
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
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError) as error:
        logger.debug("The command ended with an error.", exc_info=True)
        print(f"error: {root_cause(error)}", file=sys.stderr)
        return 1


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; a value is JSON, or else text."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair} is invalid: write --set KEY=VALUE.")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = str(Path(value).expanduser()) if value.startswith("~") else value
    return settings


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _codes(text: str) -> str | dict[str, int | str]:
    return json.loads(text) if text.startswith("{") else text


def _teachers(arguments: argparse.Namespace) -> None:
    if arguments.bundle:
        from amkd_monai.engines.prepare import format_bundle

        print(format_bundle(arguments.bundle, settings_of(arguments.set), arguments.weights_dir))
        return
    from amkd_monai.teachers.catalogue import format_catalogue

    print(format_catalogue(arguments.weights_dir))


def _fetch(arguments: argparse.Namespace) -> None:
    from amkd_monai.teachers.catalogue import entry, fetch

    teacher = entry(arguments.teacher)
    if not teacher.hub:
        raise ValueError(f"{teacher.name} cannot be downloaded by this command: get it by hand ({teacher.source}).")
    print(f"{fetch(teacher.hub, teacher.hub_files)} (licence: {teacher.licence})")


def _compare(arguments: argparse.Namespace) -> None:
    from amkd_monai.data.datasets import recorded_task
    from amkd_monai.metrics.compare import compare_runs, format_comparison
    from amkd_monai.storage import read_json

    reference = Path(arguments.reference) / "per_case.csv"
    others = {run: Path(run) / "per_case.csv" for run in arguments.runs}
    for file in (reference, *others.values()):
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}: give the output folder of an evaluated run.")
    figures, *of_others = (read_json(file.with_name("metrics.json")) for file in (reference, *others.values()))
    if arguments.metric == "nsd" and any(f.get("nsd_tolerance") != figures.get("nsd_tolerance") for f in of_others):
        raise ValueError("The runs were scored with different tolerances of NSD: score them with one, or leave nsd.")
    task = recorded_task(figures) if figures else None  # case files alone are taken for those of masks
    rows = compare_runs(reference, others, arguments.metric, task)
    title = task.name if task is not None and task.is_classification else arguments.metric or "dice"
    print(format_comparison(rows, f"{title}, compared with {arguments.reference}"))


def _new(arguments: argparse.Namespace) -> None:
    from amkd_monai.bundles.new import new_bundle

    classes = [name.strip() for name in arguments.classes.split(",")] if arguments.classes else []
    how = classes, arguments.groups, arguments.kind, arguments.modality
    folder, facts = new_bundle(arguments.name, arguments.data, arguments.to, *how)
    command = f"python -m monai.bundle run training --config_file {folder}/configs/train.json"
    print(*facts, f"{folder} is ready: {command}", sep="\n")


def _data_check(arguments: argparse.Namespace) -> int:
    import pooch

    from amkd_monai.data.check import check_data, write_contact_sheet
    from amkd_monai.data.datalist import resolve_dataset_dir
    from amkd_monai.data.datasets import get_task
    from amkd_monai.data.splits import SplitOptions

    name, config, bundles = arguments.name, {}, Path("bundles")
    for folder in (Path(name), Path("bundles") / name):
        if (folder / "configs" / "train.json").is_file():
            config = json.loads((folder / "configs" / "train.json").read_text(encoding="utf-8"))
            if "task" not in config:
                raise ValueError(f"{folder} has several data sets: check the bundle of each.")
            described = folder / "configs" / "task.json"
            name, bundles = str(described) if described.is_file() else config["task"], folder.parent
            break
    settings = ("dataset_dir", "data_options", "folds", "fold", "split_seed", "mask_codes")
    given = {key: getattr(arguments, key) for key in settings}
    how = {key: config.get(key) if value is None else value for key, value in given.items()}
    caches = bundles / ".cache" if bundles.is_dir() else pooch.os_cache("amkd_monai")  # leaves no folder just anywhere
    cache = Path(arguments.cache_dir or caches / get_task(name).name)
    root, _ = resolve_dataset_dir(name, how["dataset_dir"], cache)
    fractions = config.get("split_fractions", SplitOptions.fractions)
    split = SplitOptions(fractions, how["folds"], how["fold"] or 0, how["split_seed"] or 0)
    report = check_data(name, root, cache, how["data_options"], split, codes := how["mask_codes"])
    print(report)
    if usable := [item for item in report.items if item["id"] not in report.damaged]:
        sheet = arguments.sheet or cache / "contact_sheet.png"
        print(f"contact sheet: {write_contact_sheet(sheet, report.task, usable, mask_codes=codes)}")
    return 1 if report.problems else 0


def _data_fetch(arguments: argparse.Namespace) -> None:
    from amkd_monai.data.datasets import get_task
    from amkd_monai.data.fetch import fetch, steps

    folder, source = fetch(arguments.name, arguments.to), get_task(arguments.name).source
    print(f"{folder} is complete. Terms: {source.terms}" if folder and source else steps(arguments.name))


def _export(arguments: argparse.Namespace) -> int:
    settings, to = settings_of(arguments.set), Path(arguments.to)
    if to.exists():
        raise FileExistsError(f"{to} already exists: remove it or give another folder.")
    from amkd_monai.export.formats import DEFAULT, PAGE, chosen_formats, of_volumes

    names = chosen_formats(DEFAULT if arguments.formats is None else arguments.formats)
    from amkd_monai.export.bundle import export_bundle
    from amkd_monai.export.page import runtime_archive
    from amkd_monai.export.source import Source

    source = Source(arguments.bundle, settings, arguments.overlay)
    names = of_volumes(names, arguments.formats is not None) if source.window else names
    runtime = runtime_archive(arguments.web_runtime) if PAGE in names else None
    how = arguments.accept_loss, arguments.cases, arguments.calibration, runtime
    left_out = export_bundle(source, to, names, *how)
    print(f"exported to {to}; card: {to / 'docs' / 'README.md'}")
    for reason in left_out:
        print(f"error: {reason}", file=sys.stderr)
    return 1 if left_out else 0


def _push(arguments: argparse.Namespace) -> None:
    from amkd_monai.export.repositories import push

    print(f"uploaded to {push(arguments.folder, arguments.repository, arguments.public)}")


def _predict(arguments: argparse.Namespace) -> int:
    from amkd_monai.export.predict import Predictor, predict

    predictor = Predictor(Path(arguments.model), arguments.int8, arguments.threads)
    return predict(predictor, arguments.input, arguments.output, arguments.dicom_seg, arguments.dicom_captures)


def _evaluate(arguments: argparse.Namespace) -> None:
    bundle, settings, data = Path(arguments.bundle), settings_of(arguments.set), arguments.data
    output = arguments.output or (data and str(bundle / "eval" / f"on_{Path(data).expanduser().resolve().name}"))
    if arguments.seen != "refuse" and not data:
        raise ValueError("--seen needs --data: give both.")
    if (bundle / "configs" / "predict.json").is_file():
        if unknown := settings.keys() - {"data_options", "mask_codes"}:
            raise ValueError(f"An exported student has no setting {min(unknown)}: use data_options and mask_codes.")
        if not data or arguments.overlay:
            raise ValueError(f"{bundle} is an exported student: give --data, and no --overlay.")
        from amkd_monai.export.evaluate import evaluate
        from amkd_monai.export.predict import Predictor

        predictor = Predictor(bundle, arguments.int8, arguments.threads)
        options, codes = (settings.get(name) for name in ("data_options", "mask_codes"))
        print(evaluate(predictor, data, Path(output), arguments.seen, options, codes))
        return
    if arguments.int8 or arguments.threads:
        raise ValueError(f"{bundle} is not an exported student: leave out --int8 and --threads.")
    from monai.bundle import run

    from amkd_monai.export.source import config_files

    files = [str(file) for name in ("train", "evaluate") for file in config_files(bundle, name, arguments.overlay)]
    given = {"other_data": data, "output_dir": output, "seen": arguments.seen if data else None}
    run(config_file=files, **settings, **{name: value for name, value in given.items() if value})


def _score(arguments: argparse.Namespace) -> None:
    from amkd_monai.metrics.score import score

    classes = [name.strip() for name in arguments.classes.split(",")] if arguments.classes else arguments.task
    given = {"predictions": arguments.prediction_codes, "references": arguments.reference_codes}
    codes = {name: value for name, value in given.items() if value is not None}
    print(score(arguments.predictions, arguments.references, arguments.output, classes, codes, arguments.nsd_tolerance))


def _label(arguments: argparse.Namespace) -> None:
    from amkd_monai.label.server import serve

    serve(arguments.bundles, arguments.studies, arguments.host, arguments.port, arguments.work)


def _serve(arguments: argparse.Namespace) -> None:
    for package in ("fastapi", "uvicorn", "python_multipart"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"serve needs {package}: run `pip install 'amkd_monai[serve]'`.")
    from amkd_monai.export.predict import Predictor
    from amkd_monai.export.serve import serve

    predictor = Predictor(Path(arguments.model), arguments.int8, arguments.threads)
    serve(predictor, arguments.host, arguments.port, arguments.limit)


def _report(arguments: argparse.Namespace) -> None:
    from amkd_monai.report.page import write_report

    print(write_report(arguments.runs, arguments.output))


def _cache_status(arguments: argparse.Namespace) -> None:
    from amkd_monai.cache.store import find_stores, format_stores

    print(format_stores(find_stores(arguments.folder), arguments.folder))


def _cache_verify(arguments: argparse.Namespace) -> int:
    from amkd_monai.cache.build import verify_store
    from amkd_monai.cache.store import find_stores

    found, wrong = find_stores(arguments.folder), 0
    for entry in found:
        faults, how = [entry.fault], "not opened"
        if entry.store is not None:
            faults, how = verify_store(entry.store, arguments.weights_dir)
        wrong += bool(faults)
        print(f"{entry.directory}: {'FAULTY' if faults else 'good'}, {entry.state} ({how})")
        for fault in faults:
            print(f"  {fault}")
    print(f"{len(found)} stores, {wrong} faulty")
    return 1 if wrong else 0


def _cache_prune(arguments: argparse.Namespace) -> None:
    from amkd_monai.cache.store import find_stores, prune, useless

    reasons = useless(found := find_stores(arguments.folder))
    removed = [entry for entry in found if entry.directory in reasons]
    for entry in removed:
        print(f"{entry.directory} ({entry.size / 1e6:.1f} MB): {reasons[entry.directory]}")
    if not arguments.dry_run:
        prune(reasons)
    freed = sum(entry.size for entry in removed) / 1e6
    print(f"{len(reasons)} of {len(found)} stores {'would be' if arguments.dry_run else 'are'} removed, {freed:.1f} MB")


def _cache_build(arguments: argparse.Namespace) -> None:
    from amkd_monai.cache.store import Part

    part, settings = Part.parse(arguments.shard), settings_of(arguments.set)
    from amkd_monai.engines.prepare import build_cache
    from amkd_monai.memory import own_peak

    built = build_cache(arguments.bundle, settings, arguments.config, part, arguments.batch_size)
    for directory in built:
        print(directory)
    if not built:
        print("Nothing to build: no image teacher takes part (crews and specialists train in the run).")
    print(f"peak memory of this process: {own_peak():.0f} MB", file=sys.stderr)
