"""Prepare a run: compute what its teachers' targets still lack, in order: cache, probes, cross-fitting, admission.

Every step keeps its result in a store that is named by all it depends on; a second run finds it there.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch import nn

from amkd_monai import __version__
from amkd_monai.cache.build import answers_store, cache_teacher, keep_answers, shown_to
from amkd_monai.cache.store import EVERYTHING, FeatureStore, Part
from amkd_monai.data.datasets import Task, get_task
from amkd_monai.data.decoded import DecodedDataset, look_unlike
from amkd_monai.data.seen import fingerprints
from amkd_monai.distillation import TeacherTarget
from amkd_monai.distillation.interface import UNCALIBRATED, Calibration
from amkd_monai.distillation.losses import UNLABELLED, one_hot_area, soft_cross_entropy
from amkd_monai.engines import crossfit, probes
from amkd_monai.engines.crew import Crew
from amkd_monai.engines.runs import expand, read_record
from amkd_monai.engines.trainer import Recipe, TeacherTargets
from amkd_monai.errors import check_number
from amkd_monai.memory import own_peak
from amkd_monai.metrics.classification import macro_auroc, mean_auroc
from amkd_monai.networks import VolumeStudent
from amkd_monai.storage import fingerprint, read_memo, write_memo
from amkd_monai.teachers import plan
from amkd_monai.teachers.base import CROSS_FITTED_KINDS, TeacherFacts, build_teacher, validate_descriptions
from amkd_monai.teachers.catalogue import how_to_get
from amkd_monai.teachers.plan import known_teacher
from amkd_monai.terminal import align

logger = logging.getLogger("amkd_monai")


def chosen_teachers(
    teachers: str | Sequence[str | Mapping[str, Any]],
    task: str,
    weights_dir: str | None = None,
    unlabelled: bool = False,
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
) -> list[Mapping[str, Any]]:
    """Return the descriptions of a run's teachers, announced and checked before anything is computed.

    The arguments are those of :func:`~amkd_monai.teachers.plan.choose`, the ``device`` of the teachers and
    the ``cache_dir`` that keeps what is known of them.
    """
    of_task = get_task(task)
    described, lines = plan.choose(teachers, of_task, weights_dir, unlabelled)
    if described and (shown := [of_task.channels[index] for index in of_task.shown_channels]):
        lines = [*lines, f"Of the channels {', '.join(of_task.channels)} teachers see {', '.join(shown)}."]
    for line in lines:
        logger.info(line)
    plan.check(described, of_task.answers, of_task.per_image, weights_dir, device=device, cache_dir=cache_dir)
    return described


def cache_image_teacher(
    train: DecodedDataset,
    validation: DecodedDataset,
    views: int,
    weights_dir: str | None,
    description: Mapping[str, Any],
    **options: Any,
) -> tuple[TeacherFacts, FeatureStore, FeatureStore]:
    """Build an image teacher's stores of the training section and of one view of the validation section."""
    teacher = known_teacher(description, weights_dir, options["cache_dir"])
    outputs = cache_teacher(teacher, train, views=views, description=description, **options)
    return teacher.facts(), outputs, cache_teacher(teacher, validation, description=description, **options)


def open_bundle(bundle: str | Path, settings: Mapping[str, Any], configs: Sequence[str] = ()) -> ConfigParser:
    """Read a bundle's training config, with ``configs`` on top and top-level ``settings`` changed.

    Another folder, and a setting that it has not, are a ValueError.
    """
    bundle = Path(bundle).expanduser()
    config = bundle / "configs" / "train.json"
    if not config.is_file():
        raise ValueError(f"{bundle} is not a training bundle, it lacks configs/train.json: give a folder of bundles/.")
    parser = ConfigParser()
    parser.read_config([str(config), *configs])
    if unknown := [key for key in settings if key not in parser.config]:
        raise ValueError(f"{bundle} has no setting '{unknown[0]}': use a top-level name of its train.json.")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    parser.update({"bundle_root": str(bundle), "device": own, **settings})
    expand(parser)
    return parser


def build_cache(
    bundle: str | Path,
    settings: Mapping[str, Any],
    configs: Sequence[str] = (),
    part: Part = EVERYTHING,
    batch_size: int | None = None,
) -> list[Path]:
    """Build the stores of image teachers that a bundle's training will ask for, and return their folders.

    ``settings`` are top-level settings that the run changes, ``configs`` files on top of ``configs/train.json``,
    ``part`` is what this process computes, ``batch_size`` the ``teacher_batch_size`` of :func:`prepare_teachers`.
    """
    built: list[Path] = []
    for parser in _of_each_task(open_bundle(bundle, settings, configs)).values():
        get, names = parser.get_parsed_content, ("train#dataset", "validation_data", "views", "weights_dir")
        how = {"cache_dir": get("cache_dir"), "device": get("device"), "dtype": get("cache_dtype"), "part": part}
        cached = partial(cache_image_teacher, *map(get, names), batch_size=batch_size, **how)
        for description in get("chosen_teachers"):
            if description["kind"] not in CROSS_FITTED_KINDS:
                built += [store.directory for store in cached(description=description)[1:]]
    return built


def _of_each_task(parser: ConfigParser) -> dict[str, ConfigParser]:
    """The configs of the tasks of a shared student's bundle by name; a bundle of one task has its own, under ''."""
    if "task_set" not in parser.config:
        return {"": parser}
    return {name: of_task.parser for name, of_task in parser.get_parsed_content("task_set").bundles.items()}


@torch.random.fork_rng(devices=[])  # a run starts alike, whether its teachers are found in the cache or not
def prepare_teachers(
    teachers: Sequence[Mapping[str, Any]],
    train: DecodedDataset,
    validation: DecodedDataset,
    student: nn.Module,
    recipe: Recipe,
    epochs: int,
    cache_dir: str,
    device: torch.device | str = "cpu",
    seed: int = 0,
    folds: int = 5,
    admission_options: Mapping[str, Any] | None = None,
    weights_dir: str | None = None,
    views: int = 1,
    cache_dtype: str = "float16",
    teacher_batch_size: int | None = None,
    init_from: str | None = None,
) -> TeacherTargets:
    """Return the targets of all teachers, computing what is still missing.

    Under torch.distributed all processes run image teachers, each over its part of the images; the first one computes
    the rest, then the others read it.

    Args:
        teachers: descriptions (:mod:`amkd_monai.teachers.base`); an empty list means no distillation. A probe answers
            in place of one with ``own_answers`` False; of one with ``cross_fit`` False the mode ``cross_fit`` admits
            no answers, whatever their score.
        train: decoded training split, unlabelled samples included.
        validation: decoded validation split: fits the calibrations of answers.
        student: the undistilled student as it starts; copied, never changed.
        recipe: the run's training recipe.
        epochs: the run's length.
        cache_dir: folder of all stores.
        device: where teachers and students run.
        seed: of folds and trainings.
        folds: of probes and cross-fitted volume specialists.
        admission_options: ``mode`` (``cross_fit``: answers are distilled only if their cross-fitted score, Dice or
            skill, beats the undistilled student's by ``margin``; ``all``; ``none``), ``features`` (``all``, or
            ``admitted``: of admitted teachers only), ``folds`` (None: those of a crew, else 3) and ``epochs`` of the
            student's cross-fitting; others are a ValueError.
        weights_dir: folder searched first for the weights of foundation teachers.
        views: stored views of every training image; with several, the student is shown exactly these.
        cache_dtype: of stored feature maps, ``float16`` or ``int8``.
        teacher_batch_size: images per forward of a teacher, see :class:`~amkd_monai.cache.build.Batches`.
        init_from: file of the student that ``student`` starts from.
    """
    known: dict[str, Any] = {"mode": "cross_fit", "features": "all", "margin": 0.01, "folds": None, "epochs": epochs}
    options = known | dict(admission_options or {})
    chosen = options["mode"] in ADMISSION_MODES and options["features"] in ("all", "admitted")
    if options.keys() - known.keys() or not chosen:
        use = f"mode (one of {', '.join(ADMISSION_MODES)}), features (all or admitted), margin, folds, epochs"
        raise ValueError(f"The admission options {admission_options} are invalid: use {use}.")
    check_number("admission#margin", options["margin"], -100, 100)
    for name, least in (("folds", 2), ("epochs", 1)):
        if options[name] is not None:
            check_number(f"admission#{name}", options[name], least, whole=True)
    shown = train.shown_classes()
    unseen = [train.class_in_words(n) for n in range(shown.shape[1]) if not shown[:, n].any()]
    if unseen:
        lacks = "no labelled training image shows %s, which the student cannot learn: give more, or another split"
        logger.warning(lacks, ", ".join(unseen))
    if note := look_unlike(train):
        logger.warning("%s", note)
    how: dict[str, Any] = {"cache_dir": cache_dir, "device": device, "dtype": cache_dtype}
    cached = partial(cache_image_teacher, train, validation, views, weights_dir, batch_size=teacher_batch_size, **how)
    validate_descriptions(teachers)
    of_slices = replace(recipe, slices=1, batch_size=recipe.batch_size * recipe.slices)  # as many as its patches hold
    of_run: tuple[Any, ...] = (train, of_slices, epochs, views, device, cache_dir)
    crews = [Crew(description, *of_run) for description in teachers if description["kind"] == "crew"]
    if options["folds"] is None:
        options["folds"] = max((crew.folds for crew in crews), default=STUDENT_FOLDS)
    shared = (train, validation, student, recipe, cache_dir, device, seed, folds, cached)
    preparation = _Preparation(*shared, {crew.name: crew for crew in crews})
    asked = [description.get("cross_fit", True) for description in teachers]
    if options["mode"] == "cross_fit" and any(asked):
        probed = [d["weights"] for d, ask in zip(teachers, asked, strict=True) if ask and d["kind"] == "student"]
        for student_file in filter(None, (init_from, *probed)):
            _refuse_seen(student_file, train, cache_dir)
    classes = [str(number) for number in range(train.num_classes)]
    single = train.findings or int(train.classes is not None)
    height, width = train.images.shape[-2:]
    plans = plan.check(teachers, classes, single, weights_dir, (height, width), device, cache_dir)
    if any(found.flops for found in plans):
        images = len(train) * views + len(validation)
        logger.info("teachers take %s, less what is cached", plan.estimate(plans, images, cache_dtype, device))
    if idist.get_world_size() > 1:
        for description in (d for d in teachers if d["kind"] not in CROSS_FITTED_KINDS):
            cached(description=description, part=Part(idist.get_rank(), idist.get_world_size()))
        idist.barrier()
    with idist.one_rank_first():
        scored = [preparation.scored_teacher(description) for description in teachers]
        record: dict[str, Any] = {"admission": options} | ({"unlabelled_images": note} if note else {})
        record |= {"classes_without_images": unseen} if unseen else {}
        own: AnswerScore | None = None
        found = [score for (_, score), ask in zip(scored, asked, strict=True) if score is not None and ask]
        margin, values = float(options["margin"]), [score.value for score in found]
        if options["mode"] == "cross_fit" and values:
            length = options["epochs"] or epochs
            own, length = preparation.student_score(options["folds"], length, max(values) - margin)
            record |= {f"undistilled_student_{name}": value for name, value in own.record().items()}
            record["undistilled_student_epochs"] = length
    plan.refuse_changed(plans)
    taught, facts = [], []
    for (teacher, score), ask in zip(scored, asked, strict=True):
        admitted, why = decide(score, own, options["mode"], margin, teacher.kind)
        if options["mode"] == "cross_fit" and not ask:
            admitted, why = False, "its outputs are left out by `cross_fit` of its description"
        distilled = admitted or options["features"] == "all"
        parts = {"outputs": admitted, "features": distilled and teacher.features is not None}
        named = " and ".join(part for part, is_taught in parts.items() if is_taught)
        logger.info("teacher %s teaches %s (%s)", teacher.name, named or "nothing", why)
        decision = {f"{part}_admitted": is_taught for part, is_taught in parts.items()} | {"admission_reason": why}
        teacher = replace(teacher, admitted=admitted, record={**teacher.record, **decision})
        facts.append(teacher.record)
        if named:
            taught.append(teacher)
    record |= {"teachers": facts, "preparation_peak_rss_mb": round(own_peak())}
    if scored and not taught:
        logger.warning("No teacher is admitted or has features: this run distils nothing and trains on labels.")
    return TeacherTargets(taught, prior_entropy(train), record, train.groups, train.classes)


def _refuse_seen(student: str, train: DecodedDataset, cache_dir: str) -> None:
    """Refuse to cross-fit what starts from a student that has learnt training images, as far as its record tells."""
    seen = (read_record(Path(student).expanduser().parent) or {}).get("seen", {})
    known = {v[0] for part in seen.values() for name, v in part.items() if "validation/" not in name}
    own = fingerprints({"": [i for i in train.data if "label" in i]}, train.sliced, cache_dir) if known else {}
    if count := sum(values[0] in known for values in own.values()):
        what = f"{student} has learnt {count} of these labelled training images, so no score is held out"
        raise ValueError(f"{what}: set admission#mode to all or none, or cross_fit of a teacher made from it to false.")


@dataclass(frozen=True)
class _Preparation:
    """What the steps of the preparation share: arguments of :func:`prepare_teachers`, and how to cache a teacher."""

    train: DecodedDataset
    validation: DecodedDataset
    student: nn.Module
    recipe: Recipe
    cache_dir: str
    device: torch.device | str
    seed: int
    folds: int
    cached: Callable[..., tuple[TeacherFacts, FeatureStore, FeatureStore]]
    crews: Mapping[str, Crew]

    def scored_teacher(self, description: Mapping[str, Any]) -> tuple[TeacherTarget, AnswerScore | None]:
        """Compute a teacher's features and answers, and score the answers; one teacher is in memory at a time."""
        crossed = description["kind"] in CROSS_FITTED_KINDS
        target, of_validation = self._cross_fitted(description) if crossed else self._image_teacher(description)
        if target.answers is None:
            return target, None
        shape = target.answers.arrays["logits"].shape
        plan.refuse_other_answers(
            target.name, shape, self.train.num_classes, self.train.findings or int(self.train.classes is not None)
        )
        taught = self._taught_classes(crossed)
        calibration = _calibration(of_validation, self.validation, taught)
        score, error = self._compared(target.answers, taught), self._score(target.answers, calibration, taught)
        record = {**target.record, **score.record(), "calibration_temperature": round(calibration.temperature, 3)}
        record |= {"calibration_offsets": [round(o, 3) for o in calibration.offsets]} if calibration.offsets else {}
        figures: dict[str, Any] = {"mean_error": error.cross_entropy, "score": score.value, "calibration": calibration}
        return replace(target, logits=shape, record=record, **figures), score

    def _taught_classes(self, crossed: bool) -> np.ndarray | None:
        """Frequencies of the classes of images in what taught cross-fitted networks, or a probe; None for masks."""
        balance = self.recipe.class_balance if crossed else 0.0
        return None if self.train.classes is None else self.train.frequencies(balance)

    def _compared(self, answers: FeatureStore, taught: np.ndarray | None) -> AnswerScore:
        """Score answers once calibrated on the labels that they are scored on, which flatters all of them alike."""
        return self._score(answers, _calibration(answers, self.train, taught), taught)

    def _score(self, answers: FeatureStore, calibration: Calibration, taught: np.ndarray | None = None) -> AnswerScore:
        """Score answers to the training section, unless it was done before: names of folders tell what they hold."""
        memo = Path(self.cache_dir) / "known_scores.json"
        known = read_memo(memo, lambda entry: isinstance(entry, dict) and "value" in entry)
        of = (answers.directory.name, self.train.directory.name, None if taught is None else taught.tolist())
        key = fingerprint(*of, asdict(calibration), __version__, *self.train.ignores)
        if key not in known:
            score = score_answers(answers, self.train, calibration, taught)
            if np.isfinite([score.value, score.cross_entropy, *score.further.values()]).all():
                write_memo(memo, {**known, key: asdict(score)})
            return score
        return AnswerScore(**known[key])

    def _image_teacher(self, description: Mapping[str, Any]) -> tuple[TeacherTarget, FeatureStore]:
        """A teacher that answers image by image, and the store of its answers to the validation section."""
        teacher, outputs, of_validation = self.cached(description)
        if teacher.is_random:
            logger.warning("The teacher '%s' has RANDOM weights: this run is a test, not a result.", teacher.name)
        grid, identity = outputs.arrays.get("grid"), {"kind": description["kind"], "fingerprint": teacher.fingerprint}
        record: dict[str, Any] = {"name": teacher.name, **identity, "licence": teacher.licence}
        record |= {"random_weights": teacher.is_random, "weights": teacher.weights_file}
        record["asked_at"] = shown_to(teacher, self.train)[1]
        record |= {"channels": list(channels)} if (channels := self.train.teacher_channels) else {}
        dtype, size = "float16" if grid is None else grid.dtype, round(outputs.bytes_per_image)
        record["stored"] = {"views": outputs.views, "dtype": dtype, "bytes_per_image": size}
        target = TeacherTarget(teacher.name, **identity, record=record)
        if grid is not None:
            mean, std = probes.channel_statistics(outputs)
            target = replace(target, grid=grid.shape, mean=mean, std=std, features=outputs)
        maps = "logits" in outputs.arrays and len(outputs.arrays["logits"].shape) == 3  # not one vector per image
        if maps and description.get("own_answers", True):
            record["answers"] = "its own"
            return replace(target, answers=outputs), of_validation
        if target.features is None:
            return target, of_validation
        record["answers"] = f"linear probe, cross-fitted in {self.folds} folds"
        answers, of_validation = self._probed(target, outputs, of_validation)
        return replace(target, answers=answers), of_validation

    def _probed(
        self, teacher: TeacherTarget, features: FeatureStore, of_validation: FeatureStore
    ) -> tuple[FeatureStore, FeatureStore]:
        """The answers of cross-fitted linear probes on a teacher's features, for both sections."""
        array, size = "grid", (features.arrays["grid"].shape[1], features.arrays["grid"].shape[2])
        if self.train.classes is not None:  # one answer per image, from the teacher's pooled vector
            array, size = "pooled", crossfit.answer_size(self.train)
        key = {"probe": f"linear-1-{array}", "folds": self.folds, "seed": self.seed}
        key["features"] = features.directory.name  # which stands for the labels, and the channels that were seen
        train, validation = (
            answers_store(teacher.name, {**key, "of": section}, dataset, size, self.cache_dir)
            for section, dataset in (("train", self.train), ("validation", self.validation))
        )
        if not (train.is_complete and validation.is_complete):
            mean, std = probes.channel_statistics(features, array)
            logits, fitted = probes.cross_fit_probes(features, self.train, mean, std, self.folds, self.seed, array)
            keep_answers(train, logits)
            rows = np.arange(len(self.validation))
            keep_answers(validation, probes.answer(of_validation, rows, mean, std, fitted, array))
        return train, validation

    def _cross_fitted(self, description: Mapping[str, Any]) -> tuple[TeacherTarget, FeatureStore]:
        """A crew or a 3D specialist, trained on the training split in folds, and its answers to the validation."""
        name, kind, sections = str(description["name"]), str(description["kind"]), (self.train, self.validation)
        if kind == "crew":
            crew = self.crews[name]
            answers, of_validation = crew.answers(*sections)
            facts = crew.facts(self.train)
        else:
            options = {"slices": 32, "steps": 300, "learning_rate": 2e-3, "folds": self.folds, **description}
            slices, steps, folds = (options[key] for key in ("slices", "steps", "folds"))
            for key, least in (("slices", 1), ("steps", 1), ("folds", 2)):
                check_number(f"{key} of the teacher '{name}'", options[key], least, whole=True)
            network = VolumeStudent(lambda: options["network"], slices, self.train.num_classes, self.seed)
            rates = dict.fromkeys(("learning_rate", "encoder_learning_rate"), options["learning_rate"])
            own: dict[str, Any] = {**VOLUME_RECIPE, **rates, "slices": slices, "min_steps": steps}
            recipe = Recipe(**own)
            method = crossfit.Method(recipe, 1, self.seed, self.device, f"3D network of {steps} steps")
            of_run = (sections, method, folds, self.seed, self.cache_dir)
            answers, of_validation = crossfit.cross_fit(name, network, *of_run)
            facts = {"answers": f"cross-fitted in {folds} folds"}
        identity: dict[str, Any] = {"kind": kind, "fingerprint": answers.directory.name}
        record = {"name": name, **identity, **facts}
        return TeacherTarget(name, **identity, answers=answers, record=record), of_validation

    def student_score(self, folds: int, epochs: int, goal: float) -> tuple[AnswerScore, int]:
        """Cross-fit the undistilled student with the run's own recipe; return its score and the length in epochs.

        A quarter of the length comes first: where the student is ahead of every teacher by then (above ``goal``, the
        best teacher's score less the margin), the whole length would decide alike.
        """
        for length in dict.fromkeys((max(1, epochs // 4), epochs)):
            title = f"undistilled for {length} of {epochs} epochs"
            method = crossfit.Method(self.recipe, length, self.seed, self.device, title)
            of_run = ((self.train,), method, folds, self.seed, self.cache_dir)
            (answers,) = crossfit.cross_fit("student", self.student, *of_run)
            score = self._compared(answers, self._taught_classes(True))
            if score.value > goal:
                break
        return score, length


def _calibration(answers: FeatureStore, dataset: DecodedDataset, taught: np.ndarray | None) -> Calibration:
    """Calibration of cached answers on a dataset's labels; ``taught`` are the class frequencies of their training."""
    rows, groups = np.flatnonzero(dataset.has_label), 0
    if dataset.classes is None:
        groups = len({dataset.groups[i] for i in rows})
        rows = rows[probes.calibrated_on(len(rows))]
    _, height, width = answers.arrays["logits"].shape
    targets = probes.cell_targets(dataset, rows, dataset.num_classes, (height, width))
    return probes.fit_calibration(torch.from_numpy(answers.read("logits", rows)).float(), targets, groups, taught)


ADMISSION_MODES = ("cross_fit", "all", "none")
STUDENT_FOLDS = 3
VOLUME_RECIPE: dict[str, Any] = {"batch_size": 1, "foreground_fraction": 0.67, "batch_dice": True}
VOLUME_RECIPE |= {"augmentation": {"gain": 0.15, "offset": 0.1}}

VOLUME_RATIO_TOLERANCE = 0.10  # a volume teacher that draws more than 10 % too much or too little is not admitted


@dataclass(frozen=True)
class AnswerScore:
    """How good answers are on the labelled samples."""

    # the score that decides, higher is better: for masks the mean Dice over cases (images or volumes) and foreground
    # classes, cases without foreground left out; for classes and findings of images the skill
    value: float
    cross_entropy: float  # mean over labelled grid cells or images, nats
    # ``volume_ratio`` of masks (predicted by true volume over all cases, of the foreground class whose ratio is
    # farthest from 1), ``macro_auroc`` of classes or findings
    further: dict[str, float] = field(default_factory=dict)
    name: str = "dice"  # of the score, ``dice`` or ``skill``

    def record(self) -> dict[str, float]:
        """All figures by name, rounded."""
        figures = {self.name: self.value, "cross_entropy": self.cross_entropy, **self.further}
        return {name: round(value, 4) for name, value in figures.items()}


@torch.inference_mode()
def score_answers(
    store: FeatureStore,
    dataset: DecodedDataset,
    calibration: Calibration = UNCALIBRATED,
    taught: np.ndarray | None = None,
) -> AnswerScore:
    """Score cached answers (``logits`` (N, classes, h, w)) against the labels.

    Masks are scored at the decoded size by Dice, classes of images by their skill 1 - CE / H (McFadden's pseudo R^2):
    0 for an answer that knows only the class frequencies, whose entropy is H, and 1 for the truth. That is the
    log-likelihood on a scale that does not depend on the data set. ``calibration`` is that of the logits, ``taught``
    the frequencies (classes,) or (2, F) of the classes in what taught them, where these are not those of the labels.
    """
    labelled = np.flatnonzero(dataset.has_label)
    if dataset.classes is not None:
        classes = dataset.labels[labelled].astype(int)  # (N,), or (N, F) of findings
        logits = calibration(torch.from_numpy(store.read("logits", labelled)).float())[..., 0]
        logits = logits if dataset.findings else logits[..., 0]
        if taught is not None:
            logits = logits + torch.from_numpy(np.log(dataset.frequencies() / taught)).float()
        cross_entropy = float(F.cross_entropy(logits, torch.from_numpy(classes)))
        skill = 1 - cross_entropy / max(prior_entropy(dataset), 1e-6)
        p = logits.softmax(1).numpy()
        auroc = mean_auroc(classes, p[:, 1]) if dataset.findings else macro_auroc(classes, p)
        return AnswerScore(skill, cross_entropy, {"macro_auroc": auroc}, "skill")
    foreground = torch.arange(1, dataset.num_classes)[:, None, None]
    overlap: dict[str, np.ndarray] = {}
    errors, known = list[float](), list[float]()
    for start in range(0, len(labelled), 32):
        rows = labelled[start : start + 32]
        logits = calibration(torch.from_numpy(store.read("logits", rows)).float())
        label = torch.from_numpy(np.stack([dataset.labels[i] for i in rows]))
        target = one_hot_area(label, dataset.num_classes, (logits.shape[-2], logits.shape[-1]))
        errors += soft_cross_entropy(target, logits.log_softmax(1)).flatten(1).mean(1).tolist()
        known += (target.sum(1) > 0).float().flatten(1).mean(1).tolist()
        answer = F.interpolate(logits, size=label.shape[-2:], mode="bilinear").argmax(1)
        for row, predicted, true in zip(rows, answer, label[:, 0], strict=True):
            p, t = (predicted == foreground) & (true != UNLABELLED), true == foreground  # (classes - 1, H, W)
            sums = overlap.setdefault(dataset.cases[row], np.zeros((len(foreground), 3)))
            sums += torch.stack([p & t, p, t], -1).sum((1, 2)).numpy()
    both, predicted_sum, true_sum = np.moveaxis(np.stack(list(overlap.values())), -1, 0)  # each (cases, classes - 1)
    valid = true_sum > 0
    dice = 2 * both[valid] / (predicted_sum + true_sum)[valid]
    ratios = (predicted_sum.sum(0) / true_sum.sum(0).clip(1))[true_sum.any(0)]
    ratio = max(ratios.tolist(), key=lambda ratio: abs(ratio - 1), default=0.0)
    error = float(np.sum(errors) / max(np.sum(known), 1e-6))
    return AnswerScore(float(dice.mean()) if valid.any() else 0.0, error, {"volume_ratio": ratio})


def decide(
    score: AnswerScore | None, student: AnswerScore | None, mode: str, margin: float, kind: str
) -> tuple[bool, str]:
    """Decide whether a teacher's answers are distilled, and say why, with its score and the undistilled student's.

    Answers about whole images must beat the student's likelihood by ``margin`` without ranking the cases worse: a
    cautious teacher that tells the classes apart less well than its student is not one to learn from.
    """
    if score is None:
        return False, "it has no outputs"
    if mode != "cross_fit" or student is None:
        return mode == "all", f"admission is set to '{mode}'"
    measure = f"{score.name.capitalize()} {score.value:.3f}"
    if score.value < student.value + margin:
        return False, f"its {measure} does not beat the undistilled student's {student.value:.3f}"
    ranking, own = score.further.get("macro_auroc"), student.further.get("macro_auroc")
    if ranking is not None and own is not None and ranking < own:
        return False, f"its {measure} is better, but its macro AUROC {ranking:.3f} is below the student's {own:.3f}"
    ratio = score.further.get("volume_ratio", 1.0)
    if kind == "crossfit_volume_specialist" and abs(ratio - 1) > VOLUME_RATIO_TOLERANCE:
        return False, f"its volumes are {ratio:.2f} times the true ones"
    return True, f"its {measure} beats the undistilled student's {student.value:.3f}"


def prior_entropy(dataset: DecodedDataset) -> float:
    """Entropy in nats of the class frequencies over all labelled pixels or images; of findings the mean over them."""
    if dataset.classes is not None:
        found = dataset.frequencies()
        return float(-(found * np.log(found)).sum(0).mean())
    counts = np.zeros(dataset.num_classes)
    for i in np.flatnonzero(dataset.has_label):
        counts += np.bincount(dataset.labels[i].ravel(), minlength=dataset.num_classes)[: dataset.num_classes]
    frequency = (counts / counts.sum()).clip(1e-12)
    return float(-(frequency * np.log(frequency)).sum())


HEADER = ("teacher", "file", "teaches", "prompt", "input", "s/image", "MB/image", "licence", "seen in training")


def format_bundle(bundle: str | Path, settings: Mapping[str, Any], weights_dir: str | None = None) -> str:
    """Return the table of a bundle's teachers, one for each task where it has several, and how to get missing ones.

    Every teacher is built and asked once, with an image of noise; ``settings`` are those that a run would change.
    """
    parser = open_bundle(bundle, {**settings, **({"weights_dir": weights_dir} if weights_dir else {})})
    tables = {name: format_task(of_task) for name, of_task in _of_each_task(parser).items()}
    return "\n\n".join(f"{name}\n{table}".lstrip() for name, table in tables.items())


def format_task(parser: ConfigParser) -> str:
    """Return the table of the teachers of one task, whose bundle's config was read."""
    names = ("teachers", "weights_dir", "chosen_teachers#unlabelled", "device")
    teachers, weights_dir, unlabelled, device = map(parser.get_parsed_content, names)
    task = get_task(parser["task"])
    described, lines = plan.choose(teachers, task, weights_dir, unlabelled)
    height, width = parser.get("volume_size", [0, *[parser.get("image_size")] * 2])[1:]
    size = int(height), int(width)
    plans = plan.check(described, task.answers, task.per_image, weights_dir, size, device)
    rows = [_row(d, found, task, size, device, weights_dir) for d, found in zip(described, plans, strict=True)]
    official = plan.official_teachers("auto", task, weights_dir)
    missing = [how_to_get(teacher, weights_dir) for teacher, file in official if file is None]
    return "\n".join([align([HEADER, *rows], left=None, ruled=True), *lines, *missing])


def _row(
    description: Mapping[str, Any],
    found: plan.Plan,
    task: Task,
    size: tuple[int, int],
    device: torch.device,
    weights_dir: str | None,
) -> tuple[str, ...]:
    name, kind, file = found.name, description["kind"], found.file[0].name if found.file else "packaged"
    if kind in CROSS_FITTED_KINDS:
        return name, "none", "answers of networks trained in folds", "", "", "", "", "yours", "your training split"
    teacher = build_teacher(description, weights_dir).to(device)
    sides = (found.image_size,) * 2 if isinstance(found.image_size, int) else found.image_size or size
    image = torch.rand(1, 3, *sides, device=device)
    inputs = [image, *([torch.zeros_like(image[:, :1]).long()] if teacher.uses_labels else [])]
    start = time.perf_counter()
    with torch.inference_mode():
        outputs = teacher(*inputs)
    values = [v for v in (outputs.grid, outputs.pooled, outputs.logits) if v is not None]
    if not all(value.isfinite().all() for value in values):  # reading a value waits for the device
        raise ValueError(f"The teacher '{name}' returns NaN or infinity: check its weights.")
    seconds, megabytes = time.perf_counter() - start, sum(v.numel() for v in values) * 2 / 1e6
    own = outputs.logits is not None and outputs.logits.ndim == 4 and description.get("own_answers", True)
    features = outputs.grid is not None
    probed = features and description.get("cross_fit", True)
    teaches = [*(["features"] if features else []), *(["its own answers"] if own else ["a probe's answers"] * probed)]
    prompt = description.get("prompts") or description.get("token_ids") or description.get("prompt") or "none"
    known = plan.official_entry(description)
    learned = plan.seen(known, task) if known else "no" if file == "packaged" else "not known"
    side = " x ".join(map(str, image.shape[-2:]))
    text = ", ".join(map(str, prompt)) if isinstance(prompt, list) else str(prompt)
    return name, file, " and ".join(teaches), text, side, f"{seconds:.2f}", f"{megabytes:.2f}", teacher.licence, learned
