"""The figure of held-out phantom cases in docs/start.md, from evaluated runs on phantoms.

python docs/tools/case_figure.py RUN [RUN ...]      # writes docs/phantom_cases.jpg

Each RUN is the output folder of a segmentation that was trained and evaluated without data. The page shows
kvasir_seg, busi and msd_heart with `--admission#mode none`, the pictures with `--image_size 128` in both commands:

python -m monai.bundle run training --config_file bundles/busi/configs/train.json --output_dir RUN --ckpt_dir RUN
python -m monai.bundle run --config_file "['bundles/busi/configs/train.json','bundles/busi/configs/evaluate.json']" \
    --output_dir RUN --ckpt_dir RUN
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from amkd_monai.data.datasets import get_task
from amkd_monai.files.pictures import CLASS_COLOURS
from amkd_monai.metrics.summary import preview_file
from amkd_monai.report.figures import drawn, enlarged

REFERENCE, PREDICTION = map(np.array, CLASS_COLOURS[:2])
TARGET = Path(__file__).resolve().parents[1] / "phantom_cases.jpg"


def cases_of(run: Path) -> list[tuple[str, float, str]]:
    """Return (id, Dice, which) of the median and of the worst case.

    Raises:
        ValueError: the run is not one on phantoms; images of patients must not get into a figure.
    """
    if not json.loads((run / "metrics.json").read_text())["data"]["phantom"]:
        raise ValueError(f"{run} is not a run on phantoms.")
    with (run / "per_case.csv").open(newline="") as file:
        cases = sorted((float(row["dice"]), row["id"]) for row in csv.DictReader(file) if row["dice"])
    return [(cases[i][1], cases[i][0], which) for i, which in ((len(cases) // 2, "median"), (0, "worst"))]


def picture(run: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a case without and with outlines; of a volume the slice through the reference's centre."""
    with np.load(preview_file(run, case)) as kept:
        if "plane0" in kept:
            image, reference, prediction = kept["plane0"], kept["reference0"], kept["prediction0"]
        else:
            image, reference, prediction = kept["image"][0], kept["reference"][0], kept["prediction"][0]
    return enlarged(image), drawn(image, [(reference, REFERENCE), (prediction, PREDICTION)])


def main(runs: list[Path]) -> None:
    """Draw the runs side by side, two cases each."""
    figure = Figure(figsize=(4.2 * len(runs), 4.6), layout="constrained")
    grid = np.atleast_2d(figure.subplots(2, 2 * len(runs)))
    for column, run in enumerate(runs):
        task = get_task(json.loads((run / "metrics.json").read_text())["task"])
        for row, (case, dice, which) in enumerate(cases_of(run)):
            for offset, view in enumerate(picture(run, case)):
                axes = grid[row, 2 * column + offset]
                axes.imshow(view)
                axes.set_axis_off()
            title = f"PHANTOM {task.classes[1]}, {task.modality}" if row == 0 else ""
            grid[row, 2 * column].set_title(title, fontsize=10, loc="left")
            grid[row, 2 * column + 1].set_title(f"{which}: Dice {dice:.2f}", fontsize=10, loc="right")
    handles = [
        Line2D([], [], color=tuple(np.array(colour) / 255), linewidth=3, label=label)
        for label, colour in (("reference", REFERENCE), ("student", PREDICTION))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.savefig(TARGET, dpi=85, pil_kwargs={"quality": 85})
    print(TARGET)


if __name__ == "__main__":
    main([Path(run) for run in sys.argv[1:]])
