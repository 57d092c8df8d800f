"""Figures as SVG text, in colours that colour-blind readers tell apart (Okabe and Ito)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
SIZE = (5.2, 3.2)
"""Of a figure in inches."""


def finish(figure: Figure) -> str:
    """Return a figure as SVG text without the heads of a file."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue().split("?>", 1)[1].split(">", 1)[1].strip()  # without XML and DOCTYPE heads


def curves(
    lines: Mapping[str, np.ndarray], epochs: Sequence[float] | np.ndarray, label: str, logarithmic: bool = False
) -> str:
    """Lines over epochs; values (epochs,) may hold NaN."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(lines.items()):
        known = ~np.isnan(values)
        (line,) = axes.plot(np.asarray(epochs)[known], values[known], label=name, color=COLOURS[i % len(COLOURS)])
        line.set_linestyle(DASHES[i // len(COLOURS) % len(DASHES)])
        line.set_marker("." if known.sum() < 12 else "")
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return finish(figure)


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str, digits: int = 2) -> str:
    """A table (R, C) of numbers as colours with the numbers in them."""
    width = max(4.0, 1 + 0.08 * max(map(len, rows)) + 0.9 * len(columns))
    figure = Figure(figsize=(width, 1.3 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="cividis", vmin=0, aspect="auto")
    bright = np.nanmax(values) / 2 if values.size else 0
    for (r, c), value in np.ndenumerate(values):
        axes.text(c, r, f"{value:.{digits}f}", ha="center", va="center", color="black" if value > bright else "white")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(label)
    return finish(figure)


def scatter(groups: Mapping[str, Sequence[float]], label: str) -> str:
    """One column of points per group with its median; for the metric of each case in each run."""
    figure = Figure(figsize=(1.8 + 1.4 * len(groups), SIZE[1]), layout="constrained")
    axes = figure.subplots()
    for i, values in enumerate(groups.values()):
        known = np.array([v for v in values if not np.isnan(v)])
        if len(known):
            spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(known))
            axes.scatter(i + spread, known, s=12, alpha=0.6, color=COLOURS[i % len(COLOURS)])
            axes.hlines(np.median(known), i - 0.3, i + 0.3, color="black")
    axes.set_xticks(range(len(groups)), list(groups), rotation=15, ha="right")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3, axis="y")
    return finish(figure)


def roc(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """ROC curves, {name: (positive (N,) bool, score (N,))}; those without both kinds of case are left out."""
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for i, (name, (positive, score)) in enumerate(lines.items()):
        if positive.all() or not positive.any():
            continue
        order = np.argsort(-score, kind="stable")
        last = np.r_[np.flatnonzero(np.diff(score[order])), len(order) - 1]  # ties move together
        hits, alarms = np.cumsum(positive[order])[last], np.cumsum(~positive[order])[last]
        x, y = np.r_[0, alarms / (~positive).sum()], np.r_[0, hits / positive.sum()]
        axes.plot(x, y, label=name, color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // len(COLOURS)])
    axes.set_xlabel("1 - specificity")
    axes.set_ylabel("sensitivity")
    axes.legend(fontsize=8, loc="lower right")
    return finish(figure)


def reliability(rows: Sequence[Mapping[str, Any]]) -> str:
    """How often an answer is right (bars) by how sure it is; on the diagonal it is calibrated."""
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.bar(
            row["low"], row["accuracy"], row["high"] - row["low"], align="edge", color="#56B4E9", edgecolor="white"
        )
        axes.text((row["low"] + row["high"]) / 2, 0.01, str(row["count"]), ha="center", fontsize=7)
    axes.plot([0, 1], [0, 1], color="black", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("probability of the predicted class")
    axes.set_ylabel("part that is right")
    return finish(figure)
