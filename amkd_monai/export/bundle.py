"""Write the student-only bundle, each format compared with the student: answers, metric, size, latency, memory.

Everything is written to a temporary folder and appears only when it is complete.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amkd_monai import __version__
from amkd_monai.data.datasets import Task
from amkd_monai.export import card, formats
from amkd_monai.export.runners import Runner, peak_memory, runner, torch_runner
from amkd_monai.export.source import Case, Source, spread
from amkd_monai.files.masks import IGNORED
from amkd_monai.files.steps import softmax
from amkd_monai.metrics.classification import macro_auroc
from amkd_monai.storage import atomic_folder, atomic_write_json
from amkd_monai.terminal import align, progress
from amkd_monai.weights import file_sha256

CALIBRATION_SLICES = 8
"""Slices taken from each volume to calibrate 8 bits."""
TOLERANCE = 1e-4
"""Largest difference of a probability between the student and a float format."""
LARGEST_LOSS = 0.005
"""Dice (half a point) or AUC that 8 bits may cost."""
REPEATS = 20


@dataclass(frozen=True)
class Row:
    """What was measured about one format."""

    name: str  # ``eager`` is the student itself
    megabytes: float
    p50: float  # latency of one image, ms, like ``p95``
    p95: float
    memory: float | None  # peak of a fresh process that answers one image, MB; None for the student itself
    difference: float  # largest, of a probability from the student's
    metric: float | None  # mean Dice over cases with foreground, or macro AUC; None where the cases do not define it


def export_bundle(
    source: Source, to: str | Path, names: Sequence[str], accept_loss: bool, cases: int, calibration: int
) -> Path:
    """Export a student to a new folder and print how each format compares with it.

    Args:
        source: the opened training bundle.
        to: new folder.
        names: formats, as from :py:func:`amkd_monai.export.formats.chosen_formats`.
        accept_loss: keep 8 bits whatever they cost.
        cases: validation images that each format answers, at most.
        calibration: training images that calibrate 8 bits, at most.

    Raises:
        ValueError: a format does not answer as the student does.
        FileExistsError: ``to`` exists.
    """
    to = Path(to)
    with atomic_folder(to) as folder:
        facts = _write_models(source, folder / "models", names, accept_loss, cases, calibration)
        for name, content in card.configs(source, facts).items():
            atomic_write_json(folder / "configs" / f"{name}.json", content)
        atomic_write_json(folder / "docs" / "export.json", facts)
        (folder / "docs" / "README.md").write_text(card.model_card(source, facts, to.name), encoding="utf-8")
        origin = f"Student exported from the bundle {source.bundle.resolve().name} by amkd_monai {__version__}."
        changelog = f"# Changelog\n\n## {source.metadata['version']}\n\n{origin}\n"
        (folder / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
        for place in ("LICENSE", "docs/data_license.txt", "configs/logging.conf"):
            shutil.copyfile(source.bundle / place, folder / place)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        lines = [f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
        (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    return to


def _write_models(
    source: Source, folder: Path, names: Sequence[str], accept_loss: bool, most_cases: int, most_calibration: int
) -> dict[str, Any]:
    """Write and check every format; return the content of ``export.json``."""
    folder.mkdir()
    cases = [source.case(item) for item in spread(source.data.validation, most_cases)]
    formats.check_size(names, cases[0].batch.shape[-2:])
    run = torch_runner(source.student)
    expected = [_probabilities(run, case) for case in cases]
    torch.save(source.state, folder / "model.pt")
    rows = [_measure("eager", run, folder / "model.pt", None, cases, expected, source.task)]
    calibration = spread(source.data.train, most_calibration) if any(map(formats.is_int8, names)) else []
    slices: list[np.ndarray] = []
    for item in calibration:
        batch = source.case(item).batch
        slices += [
            batch[i : i + 1] for i in np.linspace(0, len(batch) - 1, min(len(batch), CALIBRATION_SLICES), dtype=int)
        ]
    image, threads = np.ascontiguousarray(cases[0].batch[:1]), torch.get_num_threads()
    for name in progress(names, desc="export"):
        path = formats.write(name, source.student, torch.from_numpy(image), folder, slices)
        memory = peak_memory(name, path, image, threads)
        rows.append(_measure(name, runner(name, path, threads), path, memory, cases, expected, source.task))
    facts = {
        "formats": [asdict(row) for row in rows],
        "threads": threads,
        "metric": "macro_auroc" if source.task.is_classification else "dice",
        "validation_cases": [case.id for case in cases],
        "calibration_images": [str(item["id"]) for item in calibration],
        "input_shape": list(cases[0].batch.shape[1:]),
    }
    print(align(card.format_cells(facts)), f"(one image, CPU, threads: {threads})", sep="\n")
    facts["remarks"] = [r for row in rows[1:] if (r := judge(row, rows[0], accept_loss))]
    for remark in facts["remarks"]:
        print(remark)
    return facts


def _probabilities(run: Runner, case: Case) -> np.ndarray:
    """Probabilities of a case: (B, C, H, W), or (1, C)."""
    parts = [case.batch[i : i + card.BATCH] for i in range(0, len(case.batch), card.BATCH)]
    return softmax(np.concatenate([run(part) for part in parts]), 1)


def _measure(
    name: str, run: Runner, path: Path, memory: float | None, cases: list[Case], expected: list[np.ndarray], task: Task
) -> Row:
    """Measure a format against the student's probabilities, ``expected``."""
    answers = [_probabilities(run, case) for case in cases]
    difference = max(float(np.abs(a - e).max()) for a, e in zip(answers, expected, strict=True))
    image, times = np.ascontiguousarray(cases[0].batch[:1]), []
    for _ in range(3 + REPEATS):
        start = time.perf_counter()
        run(image)
        times.append((time.perf_counter() - start) * 1e3)
    p50, p95 = np.percentile(times[3:], (50, 95)).tolist()  # the first are a warm-up
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]  # OpenVINO keeps weights aside
    size = sum(file.stat().st_size for file in files) / 1e6
    return Row(name, size, p50, p95, memory, difference, _score(answers, cases, task))


def _score(answers: Sequence[np.ndarray], cases: Sequence[Case], task: Task) -> float | None:
    """Macro AUC of the probabilities, or the mean Dice of cases, at the network's resolution; None if undefined."""
    if task.is_classification:
        area = macro_auroc([int(case.label) for case in cases], np.concatenate(answers))
        return None if math.isnan(area) else area
    values = []
    for answer, case in zip(answers, cases, strict=True):
        found = np.where(case.label == IGNORED, IGNORED, answer.argmax(1))
        masks = ((found == label, case.label == label) for label in range(1, len(task.classes)))
        if dices := [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in masks if b.any()]:
            values.append(float(np.mean(dices)))
    return float(np.mean(values)) if values else None


def judge(row: Row, student: Row, accept_loss: bool) -> str:
    """Return a remark on what a format costs, empty if it costs nothing.

    Raises:
        ValueError: a float format differs from the student, or 8 bits lose too much and that is not accepted.
    """
    is_int8 = formats.is_int8(row.name)
    tolerance = 1.0 if is_int8 else TOLERANCE  # 1: not a number is refused for 8 bits too
    if not row.difference <= tolerance:
        difference = f"by {row.difference:.2g} in a probability, more than {tolerance:g}"
        raise ValueError(f"The format {row.name} differs from the PyTorch student {difference}: use other --formats.")
    if not is_int8:
        return ""
    if row.metric is None or student.metric is None:
        what = "cannot be judged on these cases"
    elif (loss := student.metric - row.metric) > LARGEST_LOSS:
        what = f"loses {loss:.4f} of {student.metric:.4f}"
    else:
        return ""
    remark = f"The format {row.name} {what} (at most {LARGEST_LOSS:g} Dice or AUC is allowed)"
    if not accept_loss:
        raise ValueError(f"{remark}: nothing was exported; add --accept-loss, or leave it out with --formats.")
    return f"{remark}, accepted by --accept-loss."
