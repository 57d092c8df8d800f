"""Figures as SVG text, in colours that colour-blind readers tell apart (Okabe and Ito), and pictures as data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.ndimage import binary_erosion

from amkd_monai.files.pictures import class_colours

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
SIZE = (5.2, 3.2)
"""Size of a figure in inches."""
OUTSIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False, "fontsize": 8}
"""Place of a legend on the right of its figure."""


def _axes(size: tuple[float, float] = SIZE, **options: Any) -> Axes:
    axes = Figure(figsize=size, layout="constrained").subplots()
    axes.set(**options)
    return axes


def _svg(axes: Axes) -> str:
    """The axes' figure as SVG text, without XML and DOCTYPE heads."""
    text = io.StringIO()
    figure: Any = axes.figure
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue().split("?>", 1)[1].split(">", 1)[1].strip()


def curves(lines: Mapping[str, np.ndarray], epochs: np.ndarray, label: str, logarithmic: bool = False) -> str:
    """Lines over epochs; values (epochs,) may hold NaN."""
    axes = _axes(xlabel="epoch", ylabel=label, yscale="log" if logarithmic else "linear")
    for i, (name, values) in enumerate(lines.items()):
        known = ~np.isnan(values)
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        }
        axes.plot(epochs[known], values[known], label=name, marker="." if known.sum() < 12 else "", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(**OUTSIDE)
    return _svg(axes)


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str, digits: int = 2) -> str:
    """A table (R, C) of numbers as colours with the numbers in them."""
    width = max(4.0, 1 + 0.08 * max(map(len, rows)) + 0.9 * len(columns))
    axes = _axes((width, 1.3 + 0.5 * len(rows)), xlabel=label)
    axes.imshow(values, cmap="cividis", vmin=0, aspect="auto")
    for (r, c), value in np.ndenumerate(values):
        ink = "black" if value > np.nanmax(values) / 2 else "white"
        axes.text(c, r, f"{value:.{digits}f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    return _svg(axes)


def scatter(groups: Mapping[str, Sequence[float]], label: str) -> str:
    """One column of points per group with its median; for the metric of each case in each run."""
    axes = _axes((1.8 + 1.4 * len(groups), SIZE[1]), ylabel=label)
    for i, values in enumerate(groups.values()):
        known = np.array([v for v in values if not np.isnan(v)])
        if len(known):
            spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(known))
            axes.scatter(i + spread, known, s=12, alpha=0.6, color=COLOURS[i % len(COLOURS)])
            axes.hlines(np.median(known), i - 0.3, i + 0.3, color="black")
    axes.set_xticks(range(len(groups)), list(groups), rotation=15, ha="right")
    axes.grid(alpha=0.3, axis="y")
    return _svg(axes)


def roc(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """ROC curves, {name: (positive (N,) bool, score (N,))}; those without both kinds of case are left out."""
    from sklearn.metrics import roc_curve

    axes = _axes((4.6, 3.6), xlabel="1 - specificity", ylabel="sensitivity")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for i, (name, (positive, score)) in enumerate(lines.items()):
        if positive.any() and not positive.all():
            x, y, _ = roc_curve(positive, score)
            axes.plot(x, y, label=name, color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // len(COLOURS)])
    axes.legend(fontsize=8, loc="lower right")
    return _svg(axes)


def reliability(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy (bars) by confidence; a calibrated student is on the diagonal."""
    names = {"xlabel": "probability of the predicted class", "ylabel": "accuracy"}
    axes = _axes((4.2, 3.6), xlim=(0, 1), ylim=(0, 1), **names)
    low, high, accuracy = (np.array([row[key] for row in rows]) for key in ("low", "high", "accuracy"))
    axes.bar(low, accuracy, high - low, align="edge", color="#56B4E9", edgecolor="white")
    for row in rows:
        axes.text((row["low"] + row["high"]) / 2, 0.01, str(row["count"]), ha="center", fontsize=7)
    axes.plot([0, 1], [0, 1], color="black", linewidth=1)
    return _svg(axes)


REFERENCE, PREDICTION = (0, 158, 115), (213, 94, 0)
"""Green and vermilion of the Okabe-Ito palette."""
SCALE_TO = 320
"""Longest side at which a picture is shown."""


def data_uri(picture: np.ndarray, quality: int = 78) -> str:
    """An RGB picture (H, W, 3) uint8 as a JPEG data URI."""
    memory = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(memory, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


def outlined(
    image: np.ndarray, reference: np.ndarray | None, prediction: np.ndarray | None, several: bool = False
) -> np.ndarray:
    """Draw the borders of masks (H, W) on an image (H, W, 3): the reference green, the prediction vermilion.

    Of ``several`` foreground classes, each is drawn in its own colour.
    """
    picture, factor = enlarged(image)
    for mask, colour in ((reference, REFERENCE), (prediction, PREDICTION)):
        if mask is None:
            continue
        labels = np.unique(mask[mask > 0]).tolist()
        for label in labels if several else labels[:1]:
            inside = np.kron(mask == label if several else mask > 0, np.ones((factor, factor), bool))
            border = inside & ~binary_erosion(inside, iterations=2, border_value=1)
            picture[border] = class_colours(label) if several else colour
    return picture


def enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """Repeat the pixels of a small image (H, W, ...) and return how often."""
    factor = max(1, SCALE_TO // max(image.shape[:2]))
    return np.repeat(np.repeat(image, factor, 0), factor, 1), factor


def tinted(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) in grey with a map (h, w) uint8 over it, dark violet for 0 to yellow for 255."""
    image, _ = enlarged(image)
    large = Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.NEAREST)
    colour = colormaps["inferno"](np.asarray(large) / 255)
    mixed = 0.45 * image.mean(-1, keepdims=True) + 0.55 * 255 * colour[..., :3]
    return mixed.round().clip(0, 255).astype(np.uint8)
