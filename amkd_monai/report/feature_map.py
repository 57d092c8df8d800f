"""Features of training images on a plane: the student's beside each teacher's, by t-SNE."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amkd_monai.metrics.summary import FEATURES
from amkd_monai.report.figures import COLOURS, finish
from amkd_monai.report.run_folder import RunFolder

FEWEST = 5
"""Cases below which a map says nothing."""
SEED = 0
MARKERS = "osD^vP*X"
PREFIX = "teacher_"


def feature_maps(run: RunFolder) -> tuple[list[tuple[str, str]], list[str]]:
    """Title and SVG of the student's map and of each teacher's, and in sentences what cannot be drawn, and why.

    Raises:
        ValueError: the file of the features is damaged or contradicts itself.
    """
    arrays = run.features()
    if arrays is None:
        return [], [f"There is no map of the features: this run kept none of its training images ({FEATURES})."]
    value, vectors = _checked(arrays, run)
    if len(value) < FEWEST:
        return [], [f"There is no map of the features: {len(value)} labelled training images are fewer than {FEWEST}."]
    names, shown, missing = run.task.classes if run.task.is_classification else None, [], []
    for name, of in vectors.items():
        if not np.isfinite(of).all():
            missing.append(f"The features of {name} are not drawn: some are not finite.")
        elif not np.ptp(of, axis=0).any():
            missing.append(f"The features of {name} are not drawn: they are the same for all images.")
        else:
            shown.append((name, _drawn(plane(of), value, names)))
    distillation = run.record.get("distillation")
    asked = distillation["teachers"] if isinstance(distillation, dict) else []
    for teacher in asked:
        if PREFIX + teacher["name"] not in arrays:
            missing.append(f"The features of {teacher['name']} are not drawn: they were not distilled.")
    return shown, missing


def plane(vectors: np.ndarray) -> np.ndarray:
    """Bring vectors (N, C), N >= 5 and not all equal, to a plane (N, 2), the same each time.

    t-SNE (van der Maaten and Hinton, JMLR 2008) on channels of mean 0 and deviation 1. Its perplexity, about the number
    of neighbours that stay neighbours, is a third of the cases, at most 30.
    """
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    scaled = StandardScaler().fit_transform(vectors.astype(np.float64))
    # exact: for so few cases as fast, and the same whatever the number of threads
    found: np.ndarray = TSNE(perplexity=perplexity, method="exact", random_state=SEED).fit_transform(scaled)
    return found


def _checked(arrays: Mapping[str, np.ndarray], run: RunFolder) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Values (N,), and vectors (N, C) by what is shown of the student and of each teacher."""
    vectors = {f"teacher {n.removeprefix(PREFIX)}": a for n, a in arrays.items() if n.startswith(PREFIX)}
    if "student" in arrays:
        vectors = {"student": arrays["student"], **vectors}
    value = arrays.get("value")
    if value is None or any(a.ndim != 2 or len(a) != len(value) for a in vectors.values()):
        raise ValueError(f"{run.folder / FEATURES} does not hold one vector and one value per image: train again.")
    if run.task.is_classification and not np.isin(value, np.arange(len(run.task.classes))).all():
        raise ValueError(f"{run.folder / FEATURES} holds a class that {run.task.name} does not have: train again.")
    return value, vectors


def _drawn(points: np.ndarray, value: np.ndarray, classes: tuple[str, ...] | None) -> str:
    """Points (N, 2) coloured by class, or by the part of the image that is foreground, grey where there is none."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    if classes is not None:
        for c, name in enumerate(classes):
            x, y = points[value == c].T
            axes.scatter(x, y, s=16, color=COLOURS[c % len(COLOURS)], marker=MARKERS[c % len(MARKERS)], label=name)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    else:
        _by_foreground(axes, points, value)
    axes.set_xticks([])
    axes.set_yticks([])
    return finish(figure)


def _by_foreground(axes: Axes, points: np.ndarray, value: np.ndarray) -> None:
    present = value > 0
    if not present.all():
        x, y = points[~present].T
        axes.scatter(x, y, s=16, color="#999999", marker="x", label="no foreground")
        axes.legend(fontsize=8, loc="lower left")
    if present.any():
        x, y = points[present].T
        dots = axes.scatter(x, y, s=16, c=value[present], cmap="viridis", vmin=0)
        axes.figure.colorbar(dots, ax=axes, label="part that is foreground")
