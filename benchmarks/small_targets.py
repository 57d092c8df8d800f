"""Few labels on phantoms at 64 px: what the loss `overlap`, the KD temperature and the stages are worth.

python benchmarks/small_targets.py --seeds 1
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bundle_runner import Setting, main, options

from amkd_monai.data.datasets import get_task

LOSSES: dict[str, dict[str, Any]] = {
    "": {},
    "_output_alone": {"losses": {"output": 1.0, "overlap": 0.0}},
    "_output_alone_at_2": {"losses": {"output": 1.0, "overlap": 0.0}, "kd_temperature": {"start": 2.0, "end": 2.0}},
}
AT_ONCE = {"recipe#first_stage": 0.0}
FEW = {"image_size": 64, "recipe#min_steps": 1, "admission": {"mode": "all"}}  # admission lets both crews in
SETS = {
    "busi": (60, 112, 960, {"labelled": 8, "folds": 2, "data_options": {"normals": False}, "max_epochs": 14}),
    "kvasir_seg": (150, 96, 768, {"labelled": 6, "split_fractions": [0.5, 0.05, 0.45], "max_epochs": 12}),
}
"""Phantoms, side and images of the crew's members, and settings by bundle."""


def settings(data: Path) -> dict[str, Setting]:
    """Write the phantoms and return the rows: undistilled, and distilled in each way."""
    rows = {}
    for bundle, (count, side, images, own) in SETS.items():
        folder = get_task(bundle).write_phantom(data, count=count)
        overrides = {**FEW, **own, "val_interval": own["max_epochs"]}
        undistilled = Setting(bundle, str(folder.resolve()), overrides, teachers=[])
        members = [{"encoder": "tf_efficientnet_lite1"}]
        crew = {"name": "crew", "kind": "crew", "members": members, "image_size": side, "images": images}
        distilled = replace(undistilled, reference=f"{bundle}_undistilled", teachers=[crew])
        rows[f"{bundle}_undistilled"] = undistilled
        for name, further in LOSSES.items():
            for stages, first in {"two_stages": {}, "at_once": AT_ONCE}.items():
                rows[f"{bundle}_{stages}{name}"] = replace(distilled, overrides={**overrides, **further, **first})
    return rows


if __name__ == "__main__":
    arguments = options(str(__doc__), "runs/small_targets").parse_args()
    main(settings(arguments.output / "data"), arguments)
