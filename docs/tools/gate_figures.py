"""Figures of what each gate does, from runs on the planted problem of the tests.

PYTHONPATH=. python docs/tools/gate_figures.py   # writes docs/gates_*.svg and prints the figures of docs/gates.md

Each image is of one of two kinds. Four teachers answer: an expert of each kind (who shouts at random about the other
kind), one that always says the class frequencies, one that shouts at random. `tests/distillation/planted_problem.py`
has the problem.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amkd_monai.report.figures import COLOURS, DASHES

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent / "tests" / "distillation"))
import planted_problem as problem  # noqa: E402
from toy_problem import generator  # noqa: E402

TEACHER_GATES = ("uniform", "paper", "reliability", "learned")
LOSS_GATES = ("fixed", "scaled", "agreement", "paper")
LOSSES = ("output", "feature", "reconstruction")
PRIORS = {"output": 1.0, "feature": 0.2, "reconstruction": 0.2}
KINDS = ("images of kind A", "images of kind B")
HEAVY = {"output": 3.0, "feature": 0.6}
"""Distillation weighs so much that a wrong teacher costs something."""
SEEN, NEW = 600, 200
STEPS, EVERY, SEEDS = 150, 6, 3


@dataclass
class Curves:
    """What is measured every few steps.

    Attributes:
        steps: when.
        teachers: weights (times, kinds, teachers), means over new images of each kind.
        factors: {loss: its factor in the total (times,)}.
        error: cross entropy of the student on new images at the end, nats.
    """

    steps: list[int] = field(default_factory=list)
    teachers: list[np.ndarray] = field(default_factory=list)
    factors: dict[str, list[float]] = field(default_factory=dict)
    error: float = 0.0


def train(seed: int, gate: str = "reliability", distil: bool = True, **options: object) -> Curves:
    """Train a student on labelled images, looking at the weights on new ones."""
    data, new = problem.planted(SEEN, seed), problem.planted(NEW, 100 + seed)
    distiller = problem.make(data, gate, distil, seed, **options)
    optimiser = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / STEPS)
    rng, curves = generator(seed), Curves()
    for step in range(STEPS + 1):
        rows = torch.randperm(len(data.image), generator=rng)[:12]
        output = distiller(problem.batch_of(data, rows), step / STEPS)
        if step % EVERY == 0 and distil:
            look(distiller, new, step, output.loss_weights, curves)
        if step < STEPS:
            optimiser.zero_grad()
            output.total.backward()
            optimiser.step()
            schedule.step()
    curves.error = problem.error_of(distiller.eval(), new)
    return curves


@torch.no_grad()
def look(distiller, new, step: int, factors: dict[str, float], curves: Curves) -> None:
    """Note the weights of teachers on new images, and the factors of losses."""
    distiller.eval()
    weights = distiller(problem.batch_of(new, torch.arange(len(new.image)))).teacher_weights["output"]
    distiller.train()
    curves.steps.append(step)
    curves.teachers.append(np.stack([weights[kind].mean(0).numpy() for kind in (new.in_a, ~new.in_a)]))
    for name in ("task", *LOSSES):
        if name in factors:
            curves.factors.setdefault(name, []).append(float(factors[name]))


def draw_teachers(runs: dict[str, Curves]) -> Figure:
    """A column per gate, a row per kind of image."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.subplots(2, len(runs), sharex=True, sharey=True)
    for column, (gate, run) in enumerate(runs.items()):
        weights = np.stack(run.teachers)
        for row, kind in enumerate(KINDS):
            axes = grid[row, column]
            for k, name in enumerate(problem.NAMES):
                style = {"color": COLOURS[k], "linestyle": DASHES[k]}  # dashes: lines may lie on each other
                axes.plot(run.steps, weights[:, row, k], label=name.replace("_", " "), **style)
            axes.set_ylim(-0.03, 1.03)
            axes.set_yticks((0, 0.5, 1))
            axes.grid(alpha=0.3, axis="y")
            if column == 0:
                axes.set_ylabel(f"weight, {kind}")
        grid[0, column].set_title(gate)
        grid[1, column].set_xlabel("step")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(problem.NAMES))
    return figure


def draw_losses(runs: dict[str, Curves]) -> Figure:
    """A panel per loss gate."""
    figure = Figure(figsize=(11, 3.0), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(runs), sharex=True, sharey=True))
    for axes, (gate, run) in zip(panels, runs.items(), strict=True):
        for k, (name, values) in enumerate(run.factors.items()):
            axes.plot(run.steps, values, color=COLOURS[k - 1], linestyle=DASHES[k], label=name)
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 4)
        axes.set_title(gate)
        axes.set_xlabel("step")
        axes.minorticks_off()
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("factor in the total loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_errors(errors: dict[str, list[float]]) -> Figure:
    """Errors of students by gate, a point per seed and the mean."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    without = float(np.mean(errors["no distillation"]))
    for place, values in enumerate(errors.values()):
        mean = float(np.mean(values))
        colour = COLOURS[-1] if place == 0 else COLOURS[0] if mean < without else COLOURS[1]
        axes.plot(values, [place] * len(values), ".", color=colour, alpha=0.5)
        axes.plot(mean, place, "D", color=colour)
    axes.axvline(without, color="black", linewidth=0.8)
    axes.set_yticks(range(len(errors)), list(errors))
    axes.invert_yaxis()
    axes.set_xlabel("cross entropy of the student on new images, nats (lower is better)")
    axes.grid(alpha=0.3, axis="x")
    return figure


def main() -> None:
    """Train, draw, and print a table."""
    torch.set_num_threads(1)
    rcParams.update({"svg.hashsalt": "amkd_monai", "svg.fonttype": "none"})  # the same file from the same run; small
    by_seed = {gate: [train(seed, gate, losses=HEAVY) for seed in range(SEEDS)] for gate in TEACHER_GATES}
    errors = {"no distillation": [train(seed, distil=False).error for seed in range(SEEDS)]}
    errors |= {gate: [run.error for run in runs] for gate, runs in by_seed.items()}
    losses = {
        gate: train(0, loss_gate=gate, losses=PRIORS, return_code="learned", scale_steps=30) for gate in LOSS_GATES
    }
    pictures = {
        "teachers": draw_teachers({gate: runs[0] for gate, runs in by_seed.items()}),
        "losses": draw_losses(losses),
        "errors": draw_errors(errors),
    }
    for name, figure in pictures.items():
        figure.savefig(DOCS / f"gates_{name}.svg", metadata={"Date": None})
    for gate, values in errors.items():
        print(f"| {gate} | {np.mean(values):.3f} | {' '.join(f'{v:.3f}' for v in values)} |")
    for gate, run in losses.items():
        print(gate, {name: (round(values[0], 3), round(values[-1], 3)) for name, values in run.factors.items()})


if __name__ == "__main__":
    main()
