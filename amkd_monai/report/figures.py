"""Figures as SVG text, in colours that colour-blind readers tell apart (Okabe and Ito), and pictures as data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from amkd_monai.files.pictures import class_colours, outlined

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DASHES = ("-", "--", "-.", ":")
SIZE = (4.0, 2.8)  # size of every figure in inches
INK = "#010203"
"""Stands for the colour of the page's text, which is light or dark."""
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "savefig.transparent": True, "font.size": 9}
STYLE |= {"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"axes.prop_cycle": cycler(linestyle=DASHES) * cycler(color=COLOURS)}  # dashes change last
STYLE |= {"legend.fontsize": 8, "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 5)}


def _axes(legend: Sequence[str] | Mapping[str, Any] = (), **options: Any) -> Axes:
    """Axes above a legend of that many names; fixed margins, since a search for them takes half of the drawing."""
    rows = (len(legend) + 1) // 2 if len(legend) > 1 else 0
    bottom = 0.17 + 0.065 * rows
    axes = Figure(figsize=SIZE).add_axes((0.16, bottom, 0.81, 0.92 - bottom))
    axes.set(**options)
    return axes


def _legend(axes: Axes, names: Sequence[str] | Mapping[str, Any]) -> None:
    if len(names) > 1:
        axes.figure.legend(loc="lower center", ncols=2, borderaxespad=0)


def _svg(axes: Axes) -> str:
    """The axes' figure as SVG text, without XML and DOCTYPE heads."""
    text = io.StringIO()
    figure: Any = axes.figure
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue().split("?>", 1)[1].split(">", 1)[1].strip().replace(INK, "currentColor")


@rc_context(STYLE)
def curves(lines: Mapping[str, np.ndarray], epochs: np.ndarray, label: str, logarithmic: bool = False) -> str:
    """Lines over epochs; values (epochs,) may hold NaN; ``logarithmic`` where they differ tenfold."""
    known = np.concatenate([values[values > 0] for values in lines.values()])
    logarithmic = logarithmic and bool(len(known)) and known.max() > 10 * known.min()
    axes = _axes(lines, xlabel="epoch", ylabel=label, yscale="log" if logarithmic else "linear")
    for name, values in lines.items():
        known = ~np.isnan(values)
        axes.plot(epochs[known], values[known], label=name, marker="." if known.sum() < 12 else "")
    low, high = axes.get_ylim()
    if not logarithmic and high - low < 0.02 * abs(high):  # else ticks would be offsets of the fifth digit
        axes.set_ylim(low - 0.01 * abs(high), high + 0.01 * abs(high))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _legend(axes, lines)
    return _svg(axes)


@rc_context(STYLE)
def heat_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str, scale: str, texts: Any
) -> str:
    """A table (R, C) of shares, 0 to 1, as colours with their ``scale`` beside it and ``texts`` (R, C) in them."""
    axes = Figure(figsize=SIZE, layout="constrained").subplots()  # names of any length
    axes.set_xlabel(label)
    axes.figure.colorbar(axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto"), label=scale)
    for (r, c), value in np.ndenumerate(values):
        axes.text(c, r, texts[r][c], ha="center", va="center", color="black" if value > 0.5 else "white")
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    return _svg(axes)


@rc_context(STYLE)
def by_size(groups: Mapping[str, Sequence[tuple[float, float]]], label: str, unit: str) -> str:
    """Metric of each case over the size of its reference, {name: (size, metric) of each case}."""
    sizes = [size for points in groups.values() for size, _ in points]
    scale = "log" if max(sizes) > 10 * min(sizes) else "linear"
    axes = _axes(groups, xlabel=unit, ylabel=label, ylim=(-0.03, 1.03), xscale=scale)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    for name, points in groups.items():
        x, y = np.transpose(points)
        axes.scatter(x, y, s=12, alpha=0.6, label=name)
    axes.grid(alpha=0.3)
    _legend(axes, groups)
    return _svg(axes)


@rc_context(STYLE)
def roc(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """ROC curves, {name: (positive (N,) bool, score (N,))}; those without both kinds of case are left out."""
    from sklearn.metrics import roc_curve

    axes = _axes(xlabel="1 - specificity", ylabel="sensitivity")
    axes.plot([0, 1], [0, 1], color="grey", linestyle="-", linewidth=0.8)
    for name, (positive, score) in lines.items():
        if positive.any() and not positive.all():
            axes.plot(*roc_curve(positive, score)[:2], label=name)
    axes.legend(loc="lower right")
    return _svg(axes)


@rc_context(STYLE)
def reliability(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy (bars) by confidence; a calibrated student is on the diagonal."""
    axes = _axes(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the predicted class (on bars: cases)")
    axes.set_ylabel("accuracy")
    low, high, accuracy = (np.array([row[key] for row in rows]) for key in ("low", "high", "accuracy"))
    axes.bar(low, accuracy, high - low, align="edge", color="#56B4E9", edgecolor="white")
    for row in rows:
        axes.text((row["low"] + row["high"]) / 2, 0.02, str(row["count"]), ha="center", fontsize=7)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1)
    return _svg(axes)


SHOWN_AT = 480  # longest side to which a small picture is enlarged, in pixels


def data_uri(picture: np.ndarray, quality: int = 80) -> str:
    """An RGB picture (H, W, 3) uint8 as a JPEG data URI."""
    memory = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(memory, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


def enlarged(array: np.ndarray, side: int = SHOWN_AT) -> np.ndarray:
    """Scale a picture (H, W, 3), smoothly, or labels (H, W) to a longest side."""
    factor = side / max(array.shape[:2])
    size = max(1, round(array.shape[1] * factor)), max(1, round(array.shape[0] * factor))
    method = Image.Resampling.BILINEAR if array.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array).resize(size, method))


def drawn(
    image: np.ndarray, masks: Sequence[tuple[np.ndarray, np.ndarray]], several: bool = False, side: int = SHOWN_AT
) -> np.ndarray:
    """Draw label maps (H, W), each with its colour, on an image (H, W, 3); ``several`` classes have their own ones."""
    parts = []
    for mask, colour in masks:
        large = enlarged(mask, side)
        for label in np.unique(mask[mask > 0]).tolist() if several else [0]:
            parts.append((large == label if several else large > 0, class_colours(label) if several else colour))
    return outlined(enlarged(image, side), parts)


def mapped(heat: np.ndarray, image: np.ndarray, colours: str, share: float = 1.0) -> np.ndarray:
    """A map (h, w) uint8 as colours, its cells as squares, mixed by its ``share`` with an image (H, W, 3) in grey."""
    large = np.asarray(Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.NEAREST)) / 255
    mixed = share * 255 * colormaps[colours](large)[..., :3] + (1 - share) * image.mean(-1, keepdims=True)
    return mixed.round().astype(np.uint8)
