"""The figures of docs/method.md, from a run on phantoms with teachers.

python docs/tools/method_figure.py RUN      # writes docs/method_teachers.jpg and docs/method_run.svg

RUN is the output folder of a training with teacher outputs. The page shows build/demo/distilled, a run of `make demo`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from amkd_monai.files.pictures import contrasting
from amkd_monai.metrics.run_folder import RunFolder, read_arrays
from amkd_monai.metrics.summary import TEACHERS
from amkd_monai.report.figures import COLOURS, DASHES, drawn, enlarged, mapped

DOCS = Path(__file__).resolve().parents[1]
SHOWN = 3
"""Training images in the figure."""


def draw_teachers(arrays: dict[str, np.ndarray]) -> Figure:
    """A row per training image: the image with its label, then the output and the weight of each teacher."""
    maps = [name for kind in ("answer_", "weight_") for name in arrays if name.startswith(kind)]
    rows = np.linspace(0, len(arrays["image"]) - 1, SHOWN).round().astype(int)
    figure = Figure(figsize=(1.9 * (len(maps) + 1), 2.0 * SHOWN), layout="constrained")
    for (row, column), axes in np.ndenumerate(figure.subplots(SHOWN, len(maps) + 1)):
        image, label = arrays["image"][rows[row]], arrays["label"][rows[row]]
        outline, name = [(label, contrasting(image)[0])], maps[column - 1]
        if column == 0:
            axes.imshow(drawn(image, outline))
            title = "PHANTOM, label"
        else:
            heat, colours = arrays[name][rows[row]], "cividis" if name.startswith("weight_") else "gray"
            axes.imshow(drawn(mapped(heat, enlarged(image), colours), outline))
            title = name.replace("answer_", "output of ").replace("weight_", "weight of ")
            title += f"\nmean {heat.mean() / 255:.2f}"
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    return figure


def draw_run(run: RunFolder) -> Figure:
    """Held-out scores behind admission, weighted losses, and weights of teachers over the epochs."""
    figure = Figure(figsize=(11, 3.0), layout="constrained")
    scores, losses, weights = figure.subplots(1, 3)
    record: dict[str, Any] = run.record["distillation"]
    held_out = {teacher["name"]: teacher["dice"] for teacher in record["teachers"] if "dice" in teacher}
    bars = {"undistilled student": record.get("undistilled_student_dice"), **held_out}
    bars = {name: value for name, value in bars.items() if value is not None}
    scores.barh(list(bars), list(bars.values()), color=[COLOURS[-1], *COLOURS][: len(bars)])
    scores.set(xlabel="held-out Dice on the labelled images", xlim=(0, 1))
    scores.invert_yaxis()
    epochs = run.history["epoch"]
    for axes, start, label in ((losses, "weighted_", "loss x factor"), (weights, "teacher_output_", "mean weight")):
        lines = {name.removeprefix(start): run.history[name] for name in run.history if name.startswith(start)}
        if axes is weights:
            lines["abstention"] = 1 - sum(lines.values())
        for k, (name, values) in enumerate(lines.items()):
            axes.plot(epochs, values, label=name, color=COLOURS[k % len(COLOURS)], linestyle=DASHES[k % len(DASHES)])
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, frameon=False)
    return figure


def main(folder: Path) -> None:
    """Draw both figures of a run.

    Raises:
        ValueError: the run is not one on phantoms, or has no teacher outputs; images of patients get into no figure.
    """
    run, arrays = RunFolder(folder), read_arrays(folder / TEACHERS)
    if not run.record["data"]["phantom"] or arrays is None:
        raise ValueError(f"{folder} is not a run on phantoms with teachers.")
    draw_teachers(arrays).savefig(DOCS / "method_teachers.jpg", dpi=85, pil_kwargs={"quality": 85})
    with rc_context({"svg.hashsalt": "amkd_monai", "svg.fonttype": "none"}):  # the same file from the same run; small
        draw_run(run).savefig(DOCS / "method_run.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
