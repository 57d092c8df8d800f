"""Draw the gains of a page's first table with their intervals: the figures of docs/results.md and docs/ablation.md.

python docs/tools/gain_figure.py docs/results.md docs/results.svg
python docs/tools/gain_figure.py docs/ablation.md docs/ablation.svg

A column whose name begins with "gain" is a series, written as `+0.107 [+0.066, +0.150]`; the columns of text before the
first figure name the row. A gain beyond the axis is written at its edge.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from amkd_monai.report.figures import COLOURS

GAIN = re.compile(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]")
AXIS = (-0.1, 0.2)


def gains(page: Path) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return {series: {row: (gain, low, high)}} of the first table of a page that has gains."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and "gain" in line)
    cells = [[cell.replace("*", "").strip(" `") for cell in line.strip("|").split("|")] for line in lines[start:]]
    rows = cells[2 : next(i for i, row in enumerate(cells) if len(row) < 2)]
    found: dict[str, dict[str, tuple[float, float, float]]] = {name: {} for name in cells[0] if name.startswith("gain")}
    for row in rows:
        texts = [cell for cell in row[: cells[0].index(next(iter(found)))] if not re.match(r"[\d.]+$", cell)]
        for name, cell in zip(cells[0], row, strict=True):
            if name in found and (match := GAIN.search(cell)):
                if ", ".join(texts) in found[name]:
                    raise ValueError(f"{page} has two rows named {', '.join(texts)}: give them names of their own.")
                found[name][", ".join(texts)] = (float(match[1]), float(match[2]), float(match[3]))
    return found


def draw(series: dict[str, dict[str, tuple[float, float, float]]]) -> Figure:
    """Draw one row per setting, one marker per series."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    for number, (label, values) in enumerate(series.items()):
        colour, shift = COLOURS[number], 0.3 * number - 0.15 * (len(series) - 1)
        for name, (gain, low, high) in values.items():
            y = names.index(name) + shift
            if not AXIS[0] < gain < AXIS[1]:
                low_side = gain < 0
                place, text = (AXIS[0] + 0.003, f"◀ {gain:+.3f}") if low_side else (AXIS[1] - 0.003, f"{gain:+.3f} ▶")
                axes.text(place, y, text, va="center", ha="left" if low_side else "right", color=colour)
                continue
            axes.errorbar(gain, y, xerr=[[gain - low], [high - gain]], fmt="os"[number % 2], color=colour, capsize=2)
        axes.plot([], [], "os"[number % 2], color=colour, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=AXIS, ylim=(len(names) - 0.5, -0.5), xlabel="gain over the undistilled student, 95 % interval")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
    return figure


if __name__ == "__main__":
    with rc_context({"svg.hashsalt": "amkd_monai", "svg.fonttype": "none"}):  # the same file from the same page; small
        draw(gains(Path(sys.argv[1]))).savefig(sys.argv[2], metadata={"Date": None})
