"""The identity of a run: ``student.json``, written beside ``model.pt``, tells how a student was trained.

Evaluation, inference and export take the settings that the student depends on from there; a setting that was given and
differs is refused. Called from configs, these functions find the workflow or parser that calls them on the stack.
"""

import difflib
import functools
import importlib.metadata
import inspect
import itertools
import json
import logging
import os
import platform
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from pydoc import locate
from traceback import walk_stack
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS, MERGE_KEY
from monai.engines import Evaluator
from monai.utils import ensure_tuple

from amkd_monai import __version__
from amkd_monai.data.datalist import OTHER, Datalist, find_dataset_dir
from amkd_monai.data.datasets import get_task, recorded_task
from amkd_monai.data.seen import Seen, fingerprints, seen_before
from amkd_monai.data.splits import Item
from amkd_monai.distillation import distiller
from amkd_monai.errors import check_number, is_true
from amkd_monai.files.masks import NAMED_CODES
from amkd_monai.files.names import label_files, some
from amkd_monai.metrics.summary import PREVIEWS, TEACHERS
from amkd_monai.storage import atomic_write_json, exclusive_lock, file_sha256, fingerprint, read_json
from amkd_monai.teachers.plan import recorded
from amkd_monai.weights import CheckpointError

logger = logging.getLogger("amkd_monai")

RECORD = "student.json"
VERSION = 1
STUDENT = "model.pt"
CHECKPOINT = "distillation.pt"
PREVIOUS = "previous"
LOCK = ".running"
OVERRIDDEN = "overridden"
EARLIER = "earlier "  # before the names of images that a student saw in runs before its own
PLACES = ["bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "cache_dir", "weights_dir", "init_from", "resume_dir"]
PLACES += ["other_data"]
RESULTS = ["run.json", "history.csv", "metrics.json", "per_case.csv", "report.html", "masks", "predictions.csv"]
RESULTS += ["split_*.json", "events.out.tfevents.*", "on_*", "per_case_seen.csv", TEACHERS, PREVIEWS]
"""What a run leaves in its output folder."""

SEEN = ("refuse", "apart")  # what an evaluation of other data does with images that took part in the training

_OF_THE_SCORED = ("data_options", "mask_codes")
"""Settings that other data may need otherwise than the data of the training."""
_NOT_OF_A_STUDENT = {"task", "split_hash", "seed", "device", "encoder_weights", "settings", *PLACES}
_NOT_OF_A_TRAINING = {"split_hash", "device", "resume", "num_workers", "on_bad_sample", *PLACES}
_NOT_OF_A_TRAINING.add("teachers")  # its record holds those that the words led to
_NOT_OF_A_STEP = {"_target_", "allow_missing_keys", "codes", "classes"}
"""Options of transforms that an image does not depend on."""
_NOT_OF_A_NETWORK = ("weights", "seed", "drop_path", "dropout")
_NOT_AN_OPTION = ("progress", "channels", "samples")
_ADMISSION = ("mode", "features", "margin", "folds", "epochs")
_REFERENCE = re.compile(r"@([A-Za-z_](?:\w|#|::)*)")
_locks: dict[Path, AbstractContextManager[None]] = {}

_WORKFLOW_KEYS = ("imports", "initialize", "run", "finalize", ConfigParser.meta_key)
"""Keys of a config that MONAI reads."""

T = TypeVar("T")


def _commands() -> Iterator[dict[str, Any]]:
    """Variables of the functions of ``monai.bundle`` that are running, innermost first."""
    frames = walk_stack(sys._getframe())
    return (f.f_locals for f, _ in frames if f.f_globals.get("__name__") == "monai.bundle.scripts")


def _callers(kind: type[T]) -> Iterator[T]:
    """The objects of a kind one of whose methods is running, innermost first."""
    frames = walk_stack(sys._getframe())
    return (f.f_locals["self"] for f, _ in frames if isinstance(f.f_locals.get("self"), kind))


def bundle_root(name: str) -> str:
    """Return the folder of the bundle whose config is being read; ``bundles/<name>`` without MONAI's commands."""
    if (workflow := next(_callers(ConfigWorkflow), None)) is not None:
        folder = Path(workflow.config_root_path)
    else:
        files = next((file for names in _commands() if (file := names.get("config_file_"))), None)
        if files is None:
            return "." if Path("configs/metadata.json").is_file() else f"bundles/{name}"
        folder = Path(files if isinstance(files, str) else files[0]).parent
    return str(folder.parent if folder.name == "configs" else folder)


def check(purpose: str) -> None:
    """Refuse options that do not exist and bad values, then take the student's settings from its record.

    Called first in ``initialize``; it starts nothing. ``purpose`` is ``training``, or one of :func:`adopt`.
    """
    if (workflow := next(_callers(ConfigWorkflow), None)) is None:
        return
    parser, (content, given) = workflow.parser, _given(workflow)
    for key, value in given.items():
        _check_option(key, content)
        for name in value if isinstance(value, dict) and _names_in(key) else ():
            _check_option(f"{key}#{name}", content)
    if given.get("purpose", "serving") != "serving":
        raise ValueError("purpose cannot be set: it names what a config does.")
    expand(parser)
    if "dataset_dir" in given and parser.config.get("other_data") is not None:
        raise ValueError("dataset_dir and other_data are both given: the folder to score is other_data alone.")
    given = {**_places(parser), **given}
    parser["bundle_root"] = parser.get_parsed_content("bundle_root")  # while the workflow is on the stack
    _check_values(parser, purpose in ("training", "serving"))
    if workflow.workflow_type == "train":
        _check_names_alone(workflow)
    if purpose != "training":
        adopt(parser, purpose, given)
    if purpose == "evaluation":
        parser[OVERRIDDEN] = _overridden(parser.config, Path(workflow.config_root_path))
        if parser[OVERRIDDEN] and "output_dir" not in given:
            changed = ", ".join(parser[OVERRIDDEN])
            raise ValueError(f"{changed} changes what is scored or how: give it its own --output_dir, or leave it out.")


def _check_names_alone(workflow: ConfigWorkflow) -> None:
    """Let ``check_properties`` look for the names of properties: MONAI's builds them, and so runs the teachers."""
    check_all = workflow.check_properties

    def check_properties() -> list[str] | None:
        vars(workflow)["_get_property"] = workflow._get_prop_id
        try:
            return check_all()
        finally:
            del vars(workflow)["_get_property"]

    vars(workflow)["check_properties"] = check_properties


def _given(workflow: ConfigWorkflow) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the config files (of a workflow built by its class: of its folder), and what was set beyond."""
    parser = workflow.parser
    tracked = {key: None for settings in DEFAULT_EXP_MGMT_SETTINGS.values() for key in settings["configs"]}
    if names := next((names for names in _commands() if "workflow_class" in names), None):  # of create_workflow
        arguments, content = names["_args"], ConfigParser.load_config_files(names["config_file"])
        _check_overlays(names["config_file"], parser.config)
        if tracking := arguments.get("tracking"):
            if not (isinstance(tracking, str) and tracking in DEFAULT_EXP_MGMT_SETTINGS):
                tracked |= ConfigParser.load_config_files(tracking)["configs"]
            content = {**tracked, **content}
        own = inspect.signature(ConfigWorkflow.__init__).parameters
        for key in (key for key, value in names["kwargs"].items() if value is None and key not in own):
            if parser.get(key.replace("::", "#"), "") is not None:
                raise ValueError(f"--{key} None is left out by MONAI, so it sets nothing: write --{key} '$None'.")
        return content, {k.replace("::", "#"): v for k, v in arguments.items() if k not in own}
    files = sorted(workflow.config_root_path.glob("*.json"), key=lambda f: f.stem not in ("train", "inference"))
    contents = [ConfigParser.load_config_file(file) for file in files if not file.stem.endswith("metadata")]
    known: dict[str, Any] = {**tracked, **{name.split("#")[0]: None for name in _references(parser.config)}}
    for content in contents:
        found = {key: value for key, value in content.items() if "#" not in key} | content.get("configs", {})
        known |= {
            k: {**known[k], **v} if isinstance(v, dict) and isinstance(known.get(k), dict) else v
            for k, v in found.items()
        }
    given = {}
    for key, value in parser.config.items():
        if key != ConfigParser.meta_key and all(value != content.get(key, content) for content in contents):
            given[key] = value
        if isinstance(value, dict) and isinstance(of_files := known.get(key), dict):
            given |= {f"{key}#{name}": inner for name, inner in value.items() if name not in of_files}
    return known, given


def _check_overlays(files: str | Sequence[str], config: Mapping[str, Any]) -> None:
    """Refuse keys of the configs on top that change nothing: those that no config below and no reference has."""
    files = [files] if isinstance(files, str) else list(files)
    known = {*ConfigParser.load_config_file(files[0]), *_WORKFLOW_KEYS, *_references(config)}
    for number in range(1, len(files)):
        below = ConfigParser.load_config_files(files[:number])
        for key, value in ConfigParser.load_config_file(files[number]).items():
            if (name := key.removeprefix(MERGE_KEY)) not in known:
                _check_option(name, below)
            for inner in value if isinstance(value, dict) and _names_in(name) else ():
                _check_option(f"{name}#{inner}", below)


def _check_option(key: str, content: Mapping[str, Any]) -> None:
    """Refuse an option that names nothing in the configs; what lies in plain data is judged by what reads it."""
    at: Any = content
    for depth, part in enumerate(key.split("#")):
        if isinstance(at, list):
            at = {str(number): item for number, item in enumerate(at)}
        if not isinstance(at, dict):
            return
        if part in at:
            at = at[part]
            continue
        names: list[str] = list(at)
        if "_target_" in at:
            accepted = _arguments(at["_target_"])
            if accepted is None or part in accepted:
                return
            names += accepted
        elif depth and not any(isinstance(v, dict) and "_target_" in v for v in at.values()):
            names = _names_in(key.split("#")[0]) if depth == 1 else []
            if not names or part in names:
                return
        above = "#".join(key.split("#")[:depth])
        below = [f"{name}#{part}" for name, value in content.items() if isinstance(value, dict) and part in value]
        nearest = below if below and not depth else difflib.get_close_matches(part, names, 1, cutoff=0.5)
        meant = "#".join(filter(None, (above, nearest[0]))) if nearest and nearest[0][0] != "_" else ""
        hint = f"did you mean --{meant}?" if meant else "see the top of the config for its options."
        raise ValueError(f"There is no option --{key} in this config: {hint}")


def _check_values(parser: ConfigParser, trains: bool) -> None:
    """Refuse numbers that end a run late or without a student, and make words of switches true or false."""
    config = {name: value for name, value in parser.config.items() if not _is_expression(value)}
    least = {"seed": 0, "num_workers": 0, **({"max_epochs": 1, "val_interval": 1} if trains else {})}
    data = {"image_size": 1, "split_seed": 0, "fold": 0, "folds": 2, "labelled": 1}
    least |= {name: low for name, low in data.items() if config.get(name) is not None}
    for name, low in least.items():
        check_number(name, config.get(name, low), low, whole=True)
    for name in ("volume_size", "spacing"):
        value = config.get(name)
        triple = isinstance(value, (list, tuple)) and [isinstance(n, (int, float)) for n in value] == [True] * 3
        if value is not None and not triple:
            raise ValueError(f"{name} is {value!r}: give three numbers.")
    if not isinstance(codes := config.get("mask_codes", "auto"), dict) and codes not in NAMED_CODES:
        raise ValueError(f"mask_codes is {codes!r}: use one of {', '.join(NAMED_CODES)}, or {{value: class}}.")
    if isinstance(device := config.get("device"), str):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device is {device!r}, which cannot be used: {str(error).splitlines()[0]}") from error
    for name, known in (("seen", SEEN), ("keep", ("best", "last") if trains else ())):
        if known and config.get(name, known[0]) not in known:
            raise ValueError(f"{name} is {config[name]!r}: use one of {', '.join(known)}.")
    for name in ("amp", "resume"):
        if name in config:
            parser[name] = is_true(config[name], name)
    epochs, interval = (parser.config.get(name, 1) for name in ("max_epochs", "val_interval"))
    if trains and interval > epochs:
        raise ValueError(f"val_interval is {interval}, above max_epochs: no student would be kept.")
    if trains and config.get("keep") == "last" and epochs % interval:
        raise ValueError(f"max_epochs is {epochs}, not a multiple of val_interval: keep 'last' needs the last epoch's.")


def _names_in(section: str) -> list[str]:
    """Options of a section of plain data that would be read only after the teachers have run; none where it is free."""
    functions: dict[str, Callable[..., Any]] = {"contrastive": distiller.ContrastiveDistillation}
    functions |= {"kd_temperature": distiller.kd_temperature, "loss_strength": distiller.distillation_strength}
    if section in functions:
        return [n for n in inspect.signature(functions[section]).parameters if n not in _NOT_AN_OPTION]
    return list({"losses": distiller.LOSSES, "admission": _ADMISSION}.get(section, ()))


def _arguments(target: str) -> list[str] | None:
    """Names of the arguments of what a config builds; None where all are taken or MONAI finds it."""
    found: Any = locate(target) if "." in target else None
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # not found here, or a built-in function
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else list(parameters)


def expand(parser: ConfigParser) -> None:
    """Expand ``~`` in every place of a config, wherever it was set."""
    for key in PLACES:
        if (value := parser.config.get(key)) == "":
            raise ValueError(f"--{key} is empty: give a folder, or leave it out.")
        if isinstance(value, str) and value.startswith("~"):
            parser[key] = str(Path(value).expanduser())
        folder = key in ("output_dir", "ckpt_dir", "cache_dir", "resume_dir") and isinstance(value, str)
        if folder and Path(parser[key]).is_file():
            raise ValueError(f"{key} is {value}, which is a file: give a folder.")


def _places(parser: ConfigParser) -> dict[str, str]:
    """Data and results that a config names instead of deriving them: as good as given on the command line."""
    values = {key: parser.config.get(key) for key in ("dataset_dir", "output_dir")}
    return {key: value for key, value in values.items() if isinstance(value, str) and not _is_expression(value)}


class Identity:
    """What a run is about to make a student from: the content of ``student.json``, ``record``, and its folders.

    ``facts`` are further content of the record. ``datalists`` and ``further`` images without labels are by folder below
    the output folder, ``""`` for that itself.
    """

    def __init__(
        self,
        parser: ConfigParser,
        facts: Mapping[str, Any],
        datalists: Mapping[str, Datalist],
        further: Mapping[str, Sequence[Item]],
    ) -> None:
        self.datalists, self.further, self.resume = datalists, further, False
        root, names = Path(parser.get_parsed_content("bundle_root")), ("output_dir", "ckpt_dir", "resume_dir")
        self.places = {name: Path(parser.get_parsed_content(name)).expanduser().resolve() for name in names}
        self.record = {"version": VERSION, "run": uuid.uuid4().hex, "bundle": root.resolve().name, **facts}
        self.record["training"] = _settings(parser.config, "training", without=_NOT_OF_A_TRAINING)
        self.record |= {"output_dir": str(self.places["output_dir"]), "versions": versions()}
        known = (k in parser.config and parser.get_parsed_content(k) for k in ("cache_dir", "init_from"))
        self.cache_dir, self.init_from = (value or None for value in known)

    @idist.one_rank_only()
    def claim(self, keep: bool = False) -> None:
        """Make the folders this run's: set aside what an earlier run left (unless ``keep``), and write the record."""
        hold(*self.places.values())
        contents = {folder: _contents([*data.validation, *data.test]) for folder, data in self.datalists.items()}
        for folder, found in contents.items() if self.resume else ():
            _refuse_changed(self.record, folder, found)
        self.record["seen"] = self.seen(keep)
        if not (keep or self.resume):
            _set_aside(self.places, self.datalists)
        for folder, data in self.datalists.items():
            data.write_split(self.places["output_dir"] / folder)
        self.record["contents"] = contents
        atomic_write_json(self.places["ckpt_dir"] / RECORD, self.record)

    def seen(self, keep: bool = False) -> dict[str, Seen]:
        """Fingerprints of the images that the student sees, by folder, and of those that it saw in earlier runs.

        Those are the run of ``init_from`` and, with ``keep``, the one in the checkpoint folder.
        """
        found = dict[str, Seen]()
        origins = [self.places["ckpt_dir"]] if keep else []
        origins += [Path(self.init_from).expanduser().parent] if self.init_from else []
        for folder, data in self.datalists.items():
            shown = [*data.train, *data.unlabelled, *self.further.get(folder, ())]
            sections = {"train": shown, "validation": data.validation}
            found[folder] = fingerprints(sections, data.task.dimensions == 3, self.cache_dir)
        for origin in origins:
            for folder, images in (read_record(origin) or {}).get("seen", {}).items():
                before = {EARLIER + name.removeprefix(EARLIER): v for name, v in images.items()}
                found[folder] = before | found.get(folder, {})
        return found

    def refuse_leaks(self) -> None:
        """Raise a ValueError for test images that another task or an earlier run shows in training."""
        shown = [(of, name, values[0]) for of, images in self.seen().items() for name, values in images.items()]
        for folder, data in self.datalists.items():
            known = {v: f"{name} of {of}" for of, name, v in shown if of != folder or name.startswith(EARLIER)}
            own = fingerprints({"test": data.test}, data.task.dimensions == 3, self.cache_dir)
            if found := [f"{name} ({known[v]})" for name, (v, *_) in own.items() if v in known]:
                what = f"{len(found)} test image(s) of {data.task.name} are shown in training, such as {found[0]}"
                raise ValueError(f"{what}: give both the same split, or leave one out.")


def identity(datalist: Datalist, further: Sequence[Item] = (), teachers: Sequence[Mapping[str, Any]] = ()) -> Identity:
    """Describe the run whose config is being read; ``further`` are images without labels beyond the data set's."""
    parser, classes = next(_callers(ConfigParser)), len(datalist.task.classes)
    if (given := parser.config["network_def"].get("num_classes", classes)) != classes:
        name, words = datalist.task.name, ", ".join(datalist.task.classes)
        raise ValueError(f"{name} has {classes} classes ({words}): set network_def#num_classes to it, not {given}.")
    facts = {
        **datalist.task.identity,
        "classes": list(datalist.task.classes),
        "data": {**datalist.describe(), "root": str(datalist.root.resolve())},
        "split": _settings(parser.config, "datalist"),
        "settings": _settings(parser.config, "train#preprocessing", "validate#preprocessing", "network_def"),
        "network": _network(parser.config),
        "preprocessing": image_steps(parser, "validate#preprocessing"),
        "teachers": [recorded(teacher, parser.get_parsed_content("weights_dir")) for teacher in teachers],
    }
    return Identity(parser, facts, {"": datalist}, {"": further})


def shared_identity(tasks: Mapping[str, Identity], settings: Sequence[str]) -> Identity:
    """Describe a run on several tasks, by the identity of each task's bundle and settings of the shared student."""
    parser = next(_callers(ConfigParser))
    left = {"version", "run", "bundle", "output_dir", "versions", "training"}
    records = {name: {k: v for k, v in of.record.items() if k not in left} for name, of in tasks.items()}
    facts = {"tasks": records, "settings": {key: parser.config[key] for key in settings}}
    data, further = ({name: getattr(of, what)[""] for name, of in tasks.items()} for what in ("datalists", "further"))
    return Identity(parser, facts, data, further)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "monai", "pytorch-ignite", "timm", "numpy")}
    return {"python": platform.python_version(), "amkd_monai": __version__, **found}


def _references(value: Any) -> set[str]:
    """Ids that a piece of config refers to, such as ``image_size`` or ``train#preprocessing``.

    MONAI's own pattern writes ``::`` for ``#``, and finds an empty id in the product ``a @ b``.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(_references, value))
    return {name.replace("::", "#") for name in _REFERENCE.findall(value)} if _is_expression(value) else set()


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("$", "@")


def _is_plain(value: Any) -> bool:
    """Whether a piece of config neither refers to anything nor builds an object, nor is one that a program gave."""
    if isinstance(value, Mapping):
        return "_target_" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, type(None))) and not _is_expression(value)


def _reached(config: Mapping[str, Any], roots: Sequence[str], without: set[str]) -> dict[str, Any]:
    """Content of parts of a config and of all that they refer to, at any remove, by id."""
    found: dict[str, Any] = {}
    waiting = list(roots)
    while waiting:
        if (name := waiting.pop()) in found or name in without:
            continue
        value: Any = config
        for part in name.split("#"):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[name] = value
        waiting += _references(value)
    return found


def _settings(config: Mapping[str, Any], *roots: str, without: set[str] = _NOT_OF_A_STUDENT) -> dict[str, Any]:
    """Plain top-level settings that parts of a config depend on."""
    found = sorted(_reached(config, roots, without).items())
    return {name: value for name, value in found if name in config and name not in roots and _is_plain(value)}


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a student's architecture depends on, by the argument of ``network_def``."""
    if not isinstance(definition := config.get("network_def"), Mapping):
        return {}
    values = {k: config.get(v[1:]) if isinstance(v, str) and v[:1] == "@" else v for k, v in definition.items()}
    return {k: v for k, v in values.items() if k not in _NOT_OF_A_NETWORK and not _is_expression(v)}


def image_steps(parser: ConfigParser, place: str) -> list[dict[str, Any]]:
    """What the chain of transforms at a place of a config does to the image: per transform its name and options."""
    steps = []
    while isinstance(chain := parser.get(place), str) and chain.startswith("@"):
        place = chain[1:]
    for number, raw in enumerate(parser.get(f"{place}#transforms") or []):
        found = {k: parser.get_parsed_content(f"{place}#transforms#{number}#{k}") for k in raw.keys() - _NOT_OF_A_STEP}
        keys = ensure_tuple(found.pop("keys", "image"))
        if "image" not in keys:
            continue
        step = {"transform": raw["_target_"].rsplit(".", 1)[-1]}
        for key, value in found.items():
            one_each = isinstance(value, (list, tuple)) and len(value) == len(keys) > 1
            step[key] = value[keys.index("image")] if one_each else value
        steps.append(_as_json(dict(sorted(step.items()))))
    return steps


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _contents(items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprint of the files (and class) of each case by its id; a file is read once, about 1 s per GB."""
    found = {}
    for item in items:
        masks = label_files(item)
        files = [Path(file) for file in (*label_files({"label": item["image"]}), *masks)]
        hashes = [file_sha256(file) if file.exists() else "missing" for file in files]
        found[str(item["id"])] = fingerprint(hashes, None if masks else str(item.get("label")))[:16]
    return found


def _refuse_changed(record: Mapping[str, Any], folder: str, contents: Mapping[str, str]) -> None:
    """Refuse cases whose files are not those of the training."""
    known = record.get("contents", {}).get(folder, {})
    if changed := [name for name, digest in contents.items() if known.get(name, digest) != digest]:
        raise ValueError(f"Files of {len(changed)} case(s) changed since the training: restore {some(changed)}.")


def read_record(ckpt_dir: str | Path) -> dict[str, Any] | None:
    """Return what was recorded of the student in a folder, None without a record; a CheckpointError if damaged."""
    file = Path(ckpt_dir) / RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise CheckpointError(f"{file} is damaged, or of another version of this package: restore it, or train again.")
    return record


def record_weights(ckpt_dir: Path, digest: str) -> None:
    """Record the SHA-256 of the weights that are about to be saved; the one before stays, should a kill keep it."""
    if record := read_json(ckpt_dir / RECORD):
        named = [*record.get("weights", [])[-1:], digest]
        atomic_write_json(ckpt_dir / RECORD, {**record, "weights": named})


def adopt(parser: ConfigParser, purpose: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Take the settings that a trained student depends on into a config, and return its record, empty without one.

    ``purpose``: ``evaluation`` and ``export`` use the run's own data and split, ``inference`` its data if no others are
    given, ``serving`` (answers or further training on a server's images) none of them. A setting of this command,
    ``given``, that differs from the student's is a ValueError.
    """
    given = {**_places(parser), **given}
    ckpt_dir = Path(parser.get_parsed_content("ckpt_dir"))
    record, config, student = read_record(ckpt_dir), parser.config, ckpt_dir / STUDENT
    scored = purpose in ("evaluation", "export")
    other = purpose == "evaluation" and config.get("other_data") is not None
    if record is None:
        if student.is_file():
            logger.warning("There is no %s for %s: its training settings cannot be checked.", RECORD, student)
        return {}
    weights = record.get("weights")
    if purpose != "serving" and weights and student.is_file() and file_sha256(student) not in weights:
        raise ValueError(f"{student} is not the student of the {RECORD} in its folder: restore it, or remove {RECORD}.")
    entries, network, own = record.get("tasks"), record.get("network", {}), _network(config)
    asked, known = config.get("task"), list(entries) if entries else [record["task"]]
    if not entries and asked is not None and "entry" not in config:
        asked = get_task(parser.get_parsed_content("task")).name
    if bool(entries) != ("task_set" in config or "entry" in config) or (asked is not None and asked not in known):
        what = f"trained for {', '.join(known)}, this config is for {asked or 'several tasks'}"
        remedy = f"open the bundle {record['bundle']} with the overlay of its training, or give another --ckpt_dir"
        raise ValueError(f"The student {student} was {what}: {remedy}.")
    wanted = {key: value for key, value in record["settings"].items() if key != "tasks"}
    if not entries and scored:
        wanted |= record["split"] | ({} if other else {"split_hash": record["data"]["split_hash"]})
    wanted = {k: v for k, v in wanted.items() if not (other and k in _OF_THE_SCORED and k in given)}
    if network and network["_target_"] != own.get("_target_"):  # a class of the user's own
        wanted["network_def"] = network
    wanted |= {f"network_def#{k}": v for k, v in network.items() if "network_def" not in wanted and own.get(k) != v}
    for key, value in wanted.items():
        if key.split("#")[0] in config and _as_json(parser.get(key)) != value:
            if any(_overlap(key, name) for name in given):
                _agree({key: parser.get(key)}, {key: value}, student)
            parser[key] = value
            logger.info("%s is %s, as the student %s was trained with", key, _shown(value), student)
    if scored and not other and "output_dir" not in given and _run_of(Path(record["output_dir"])) == record["run"]:
        copied = _run_of(Path(parser.get_parsed_content("output_dir"))) == record["run"]
        parser["output_dir"] = config["output_dir"] if copied else record["output_dir"]
    if entries:
        _adopt_tasks(parser, record, given, student)
        return record
    _check_task(parser, record, student, data=scored and not other)
    if other:
        if not given.get("output_dir"):
            raise ValueError("other_data needs an --output_dir of its own.")
    elif purpose != "serving" and not given.get("dataset_dir") and (root := _data_root(record["data"])):
        parser["dataset_dir"] = root
    return record


def _agree(now: Mapping[str, Any], then: Mapping[str, Any], student: Path, remedy: str = "leave --{} out") -> None:
    """Refuse settings, by name, that are not those of a student's training."""
    for name in {**now, **then}:
        if _as_json(now.get(name)) != _as_json(then.get(name)):
            was = f"the student {student} was trained with {_shown(then.get(name))}"
            raise ValueError(f"{name} is {_shown(now.get(name))}, but {was}: {remedy.format(name)}.")


@functools.cache  # once, though an export reads the record for several configs
def _warn_of_phantoms(root: str) -> None:
    logger.warning("The student was trained on generated PHANTOMS, which are used here, too: %s", root)


def _data_root(data: Mapping[str, Any]) -> str | None:
    """Where a run's data lie, None where they must be searched for; phantoms never replace real data that are gone."""
    if Path(data["root"]).is_dir():
        if data["phantom"]:
            _warn_of_phantoms(data["root"])
        return str(data["root"])
    if not data["phantom"] and find_dataset_dir(recorded_task(data)) is None:
        raise ValueError(f"The run's data were in {data['root']}, which does not exist: give --dataset_dir.")
    return None


def _adopt_tasks(parser: ConfigParser, record: Mapping[str, Any], given: Mapping[str, Any], student: Path) -> None:
    """Take each task's entry, data and split of a shared student, or one task's settings for inference."""
    entries, trained = record["tasks"], record["settings"]["tasks"]
    if "entry" in parser.config:
        settings, entry = entries[parser.config["task"]]["settings"], parser.config["entry"]
        settings = {k: v for k, v in settings.items() if k not in ("encoder", "mask_codes")}
        _agree({k: entry.get(k, v) for k, v in settings.items()}, settings, student)
        parser["entry"] = {**entry, **settings}
        return
    named = any(_overlap("tasks", option) for option in given)
    if not (named or "only" in given):
        parser["only"] = list(entries)
    tasks = dict(parser.config["tasks"])
    for name, of_task in entries.items():
        place = None
        if named and name in tasks:
            place, left = tasks[name].get("dataset_dir"), {"dataset_dir"}
            now, then = ({f"tasks#{name}#{k}": of[k] for k in of.keys() - left} for of in (tasks[name], trained[name]))
            _agree(now, then, student)
        if place is None and name in (given.get("only") or entries) and not given.get("dataset_dir"):
            place = _data_root(of_task["data"])
        known = {**of_task["settings"], **trained[name]}  # a default of the bundle may have changed since
        tasks[name] = {**known, "dataset_dir": place, "split_hash": of_task["data"]["split_hash"]}
    parser["tasks"] = tasks


def check_part(task: str, parser: ConfigParser) -> None:
    """Refuse the bundle of one task, in use, that is not as it was when its shared student was trained."""
    ckpt_dir, purpose = Path(parser.get_parsed_content("ckpt_dir")), parser.config["purpose"]
    records = (read_record(ckpt_dir) or {}).get("tasks", {})  # without those whose heads were carried on
    if purpose != "training" and task in records:
        _check_task(parser, records[task], ckpt_dir / STUDENT, data=purpose == "evaluation")


def _check_task(parser: ConfigParser, record: Mapping[str, Any], student: Path, data: bool) -> None:
    """Refuse a task described or prepared otherwise than in the training; with ``data`` its layout counts, too."""
    task = get_task(parser.get_parsed_content("task")) if "task" in parser.config else recorded_task(record)
    left = {"folder"} if data else {"folder", "layout"}
    described = (task.description or {}, record.get("description") or {})
    now, then = ({k: v for k, v in of.items() if k not in left} for of in described)
    _agree(now, then, student, "restore the description of the task")
    _agree({"classes": list(task.classes)}, {"classes": record["classes"]}, student, "train again")
    place = "preprocessing" if "preprocessing" in parser.config else "validate#preprocessing"
    for step, before in itertools.zip_longest(image_steps(parser, place), record["preprocessing"]):
        _agree({place: step or "nothing"}, {place: before or "nothing"}, student, "restore it")


def _overridden(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Parts of an evaluation that differ from the bundle's own configs; plain settings are compared with the record."""
    handlers = [h for h in config["validate"]["handlers"] or () if "tracking_uri" not in h]
    now = {**config, "validate": {**config["validate"], "handlers": handlers}}
    overlays = [file.stem.removesuffix("_evaluate") for file in folder.glob("*_evaluate.json")]
    chains = [("train", "evaluate"), *(("train", name, "evaluate", f"{name}_evaluate") for name in overlays)]
    found = []
    for chain in chains:
        own = ConfigParser()
        own.read_config([str(file) for name in chain if (file := folder / f"{name}.json").is_file()])
        own.resolve_macro_and_relative_ids()
        found.append(dict(_differences(now, own.config)))
    return min(found, key=len)


def _differences(now: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    without = _NOT_OF_A_STUDENT | {"network_def"}
    there = _reached(own, ["run"], without)
    for name, value in _reached(now, ["run"], without).items():
        before = there.get(name)
        if value == before or ("#" not in name and _is_plain(value) and _is_plain(before)):
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            differing = (k for k in value.keys() | before.keys() if value.get(k) != before.get(k))
            yield from ((f"{name}#{k}", value.get(k)) for k in differing)
        else:
            yield name, value


def start(found: Identity, resume: bool | str = False) -> None:
    """Start a training: lock its folders before anything is computed.

    Folders of another run or bundle are a ValueError, nothing to resume is a CheckpointError.
    """
    found.resume = is_true(resume)
    if idist.get_rank() == 0:
        hold(*found.places.values())
    folder, results = found.places["ckpt_dir"], found.places["output_dir"]
    old, run, task = read_record(folder), read_json(results / "run.json"), found.record.get("task")
    if found.resume:
        checkpoint = found.places["resume_dir"] / CHECKPOINT
        if not checkpoint.is_file():
            raise CheckpointError(f"There is nothing to resume at {checkpoint}: start without --resume.")
        if old is not None:
            before, now = _as_json(_core(old)), _as_json(_core(found.record))
            refuse_another({**now, **before}, now, checkpoint)
            found.record = {**old, "output_dir": found.record["output_dir"]}
            if _run_of(results) not in ("", old["run"]):
                raise ValueError(f"{results} holds another run: give the --output_dir of the one resumed.")
    elif old is not None and old.get("task") != task:
        raise ValueError(f"{folder} holds a student of the bundle {old['bundle']}: give another --ckpt_dir.")
    elif run.get("data", {}).get("task", None if "tasks" in run else task) != task:
        raise ValueError(f"{results} holds the results of another bundle: give an --output_dir of this run.")
    elif idist.get_rank() == 0 and (found.init_from or len(found.datalists) > 1):
        found.refuse_leaks()


def _core(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    inner = {key: value for part in ("settings", "split", "training") for key, value in record.get(part, {}).items()}
    kept = {key: record.get(key) for key in ("classes", "description", "network", "preprocessing", "teachers")}
    tasks = {name: _core(of_task) for name, of_task in record.get("tasks", {}).items()}
    return {**inner, "split_hash": record.get("data", {}).get("split_hash"), **kept, "parts": tasks}


def refuse_another(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to resume a run with other settings."""
    if differing := [key for key in now if now[key] != before.get(key)]:
        what = ", ".join(differing)
        raise CheckpointError(f"{checkpoint} is of a run with another {what}: repeat its settings, or do not resume.")


def start_evaluation(
    data: Datalist | Mapping[str, Datalist],
    output_dir: str | Path,
    ckpt_dir: str | Path,
    other_data: str | None = None,
    seen: str = SEEN[0],
) -> None:
    """Start an evaluation: lock its folder, and refuse to write over the figures of another run or of other data.

    A student in training, changed test files and, unless ``seen`` is ``apart``, images it has seen are refused too, all
    by a ValueError.
    """
    folder, record, student = Path(output_dir), read_record(ckpt_dir), Path(ckpt_dir) / STUDENT
    if idist.get_rank() != 0:
        return
    if os.access(ckpt_dir, os.W_OK):
        end(*hold(Path(ckpt_dir)))
    hold(folder)
    metrics, changed = read_json(folder / "metrics.json"), _recorded_overrides()
    other = data if isinstance(data, Datalist) and data.source == OTHER else None
    if other_data and not other:
        raise ValueError(f"other_data is {other_data}, but another datalist is given: leave one of both out.")
    before, wrong = metrics.get("data", {}), dict[str, bool]()
    if record is None:
        scored = metrics.get("student_sha256")
        wrong["another student"] = bool(scored) and student.is_file() and file_sha256(student) != scored
    else:
        run, own = _run_of(folder), "" if other or changed else record["run"]
        is_another = run not in ("", own) or metrics.get("run") not in (None, "", record["run"])
        wrong[f"another run than that of {ckpt_dir}"] = is_another
        splits = {before.get("split_hash"), getattr(data, "hash", None)} - {None}
        wrong["other data or options"] = len(splits) > 1 or bool(metrics and metrics.get(OVERRIDDEN, {}) != changed)
        root = str(other.root) if other else ""
        wrong[f"other data, {before.get('root')}"] = bool(other) and before.get("root", root) != root
    for what in (what for what, is_so in wrong.items() if is_so):
        raise ValueError(f"{folder} holds figures of {what}: give an --output_dir of its own.")
    if other:
        if (known := (record or {}).get("seen")) is None:
            logger.warning("No record says which images the student has seen: %s cannot be checked.", other.root)
            return
        images = {name: values for of_folder in known.values() for name, values in of_folder.items()}
        cache_dir = next(_callers(ConfigParser)).get_parsed_content("cache_dir")
        other.seen.update(seen_before(images, other, seen, cache_dir))
    elif record is not None:
        for name, of_task in ({"": data} if isinstance(data, Datalist) else data).items():
            _refuse_changed(record, name, _contents(of_task.test))


def _recorded_overrides() -> dict[str, Any]:
    """What :func:`check` found overridden in the evaluation that is running."""
    configs = (parser.config for parser in _callers(ConfigParser))
    return next((config[OVERRIDDEN] for config in configs if OVERRIDDEN in config), {})


def evaluated(data: Datalist, ckpt_dir: str | Path, skipped: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
    """Return the facts of a report: the data, which student of which run was scored, and which cases were left out."""
    student = Path(ckpt_dir) / STUDENT
    facts: dict[str, Any] = {"data": data.describe(), "skipped_samples": skipped, "student": str(student)}
    facts["student_sha256"] = file_sha256(student) if student.is_file() else None
    changed, record = _recorded_overrides(), read_record(ckpt_dir) or {}
    if data.source == OTHER:
        config = next(_callers(ConfigParser)).config
        facts |= {"seen": data.seen, "seen_is_known": "seen" in record}
        facts |= {name: config[name] for name in _OF_THE_SCORED if name in config}
    return {**facts, "run": record.get("run"), **({OVERRIDDEN: changed} if changed else {})}


def end(*folders: str | Path | Identity) -> None:
    """Let others use the folders of a run again, and say where a training left its student."""
    for folder in folders:
        if isinstance(folder, Identity) and idist.get_rank() == 0:
            logger.info(
                "The student is %s, its run record %s. To score it, repeat the command with evaluate.json after "
                "train.json in --config_file, which also writes report.html.",
                folder.places["ckpt_dir"] / STUDENT,
                folder.places["output_dir"] / "run.json",
            )
        for place in folder.places.values() if isinstance(folder, Identity) else [Path(folder).resolve()]:
            if lock := _locks.pop(place, None):
                lock.__exit__(None, None, None)


def tell_predicted(evaluator: Evaluator, output_dir: str | Path) -> None:
    """Say how many images were predicted, and where the results are."""
    logger.info("predicted %d image(s) into %s", len(evaluator.data_loader), Path(output_dir).resolve())


def hold(*folders: Path) -> list[Path]:
    """Lock folders for this process and return those that it did not hold; the kernel frees the locks on a kill.

    A TimeoutError where another process holds one of them.
    """
    taken: list[Path] = []
    for folder in dict.fromkeys(f.expanduser().resolve() for f in folders):
        if folder in _locks:
            continue
        lock = exclusive_lock(folder / LOCK)
        try:
            lock.__enter__()
        except TimeoutError:
            end(*taken)
            raise TimeoutError(f"Another run works in {folder}: wait, or give other folders.") from None
        _locks[folder] = lock
        taken.append(folder)
    return taken


def _set_aside(places: Mapping[str, Path], tasks: Mapping[str, Any]) -> None:
    """Move what an earlier run left into ``previous/<run>``; interrupted, both places hold files of that run alone."""
    student, results, checkpoint = places["ckpt_dir"], places["output_dir"], places["resume_dir"]
    found = [(student, RECORD), (student, STUDENT), (checkpoint, CHECKPOINT)]
    found += [(results, f"{task}/{pattern}".lstrip("/")) for task in {"", *tasks} for pattern in RESULTS]
    files = [(base, file) for base, pattern in found for file in sorted(base.glob(pattern))]
    files = [(b, f) for b, f in files if not ("tfevents" in f.name and f".{os.getpid()}." in f.name)]  # this run's
    if not files:
        return
    old = ((read_record(student) or {}).get("run") or _run_of(results) or f"{files[0][1].stat().st_mtime_ns:x}")[:12]
    for base, file in files:
        names = itertools.chain([old], (f"{old}-{number}" for number in itertools.count(1)))
        targets = (base / PREVIOUS / name / file.relative_to(base) for name in names)
        target = next(path for path in targets if not path.exists())
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    logger.info("results of an earlier run were moved to %s", student / PREVIOUS / old)


def _run_of(folder: Path) -> str:
    return str(read_json(folder / "run.json").get("run") or "")


def _overlap(key: str, name: str) -> bool:
    return f"{key}#".startswith(f"{name}#") or f"{name}#".startswith(f"{key}#")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 200 else f"{text[:197]}..."
