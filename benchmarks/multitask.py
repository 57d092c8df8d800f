"""One student for several data sets against students of single ones, on real data: the table of docs/results.md.

    python benchmarks/multitask.py --shared ../shared                    # six data sets; resumable
    python benchmarks/multitask.py --shared ../shared --smoke            # two data sets, one epoch each: does it run?

Per seed: (a) a student of each data set without teachers, (b) the same with teachers, (c) one student for all with the
same teachers and as many batches as all runs of (b) together, (d) (c) fine-tuned on each data set for a third of the
length of (a). A run that has its metrics.json is not repeated; all runs share one process and one thread."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from tables import Row, table

ROOT = Path(__file__).resolve().parent.parent
FEATURES_ONLY = {"teachers": "imagenet", "admission": {"mode": "none"}}
FOLDS = {"folds": 3}
SHORT, SHORT_CLASSES = {"recipe#min_steps": 1}, {"recipe#min_steps": 8}
DATA: dict[str, tuple[str, dict[str, Any]]] = {  # data, and settings of its bundle; (a) and (b) train for max_epochs
    "busi": ("BUSI/Dataset_BUSI_with_GT", {**FOLDS, "image_size": 128, "max_epochs": 24, **SHORT}),
    "covid": ("COVID/COVID-SemiSeg", {"image_size": 128, "max_epochs": 24, **SHORT}),
    "kvasir_seg": ("Kvasir-SEG", {"image_size": 128, "max_epochs": 24, **SHORT, "split_fractions": [0.5, 0.1, 0.4]}),
    "msd_heart": (
        "MSD-Heart/Task02_Heart_half",
        {"max_epochs": 3, "spacing": [2.5, 2.5, 2.74], "volume_size": [96, 96, 64], "fold": 2},
    ),
    "aptos2019": ("APTOS2019_standin_IDRiD", {**FOLDS, "image_size": 160, "max_epochs": 12, **SHORT_CLASSES}),
    "isic2017": ("ISIC2017", {"image_size": 128, "max_epochs": 12, **SHORT_CLASSES}),
}
SHARED_EPOCHS = 10
LABELS = ("undistilled", "distilled", "shared", "fine_tuned")


def run(bundle: str, configs: tuple[str, ...], values: dict[str, Any]) -> None:
    """Run a bundle in this process."""
    folder = ROOT / "bundles" / bundle
    workflow = ConfigWorkflow(
        workflow_type="train",
        config_file=[str(folder / "configs" / f"{config}.json") for config in configs],
        meta_file=str(folder / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(folder),
        **values,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def single(bundle: str, label: str, seed: int, settings: dict[str, Any], output: Path) -> Path:
    """Train and evaluate a student of one data set unless it is done."""
    folder = output / f"{bundle}_{label}" / f"fold0_seed{seed}"
    if not (folder / "metrics.json").is_file():
        values = {**FEATURES_ONLY, **settings, "output_dir": str(folder), "ckpt_dir": str(folder), "seed": seed}
        run(bundle, ("train",), values)
        run(bundle, ("train", "evaluate"), values)
        print(f"done: {folder}", flush=True)
    return folder


def shared(bundles: list[str], seed: int, tasks: dict[str, Any], output: Path, cache: str) -> Path:
    """Train and evaluate one student for all data sets unless it is done; its reports join those of single ones."""
    folder = output / "shared" / f"seed{seed}"
    places = {bundle: output / f"{bundle}_shared" / f"fold0_seed{seed}" for bundle in bundles}
    if not all((place / "metrics.json").is_file() for place in places.values()):
        records = [_json(output / f"{b}_distilled" / f"fold0_seed{seed}" / "run.json") for b in bundles]
        batches = sum(record["steps_per_epoch"] * record["epochs_done"] for record in records)
        per_step = min(3, len(bundles))
        values = {
            "tasks": tasks,
            "cache_dir": cache,
            "output_dir": str(folder),
            "ckpt_dir": str(folder),
            "seed": seed,
            "max_epochs": min(SHARED_EPOCHS, max(1, batches // per_step)),
            "tasks_per_step": per_step,
            "resume": (folder / "distillation.pt").is_file(),
            **FEATURES_ONLY,
        }
        values["steps_per_epoch"] = max(1, batches // (per_step * values["max_epochs"]))
        run("multitask", ("train",), values)
        compare = {k: str(output / f"{{task}}_{k}" / f"fold0_seed{seed}") for k in ("undistilled", "distilled")}
        run("multitask", ("train", "evaluate"), {**values, "compare": compare})
        for bundle, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "run.json", place)
            for name in ("per_case.csv", "metrics.json"):
                shutil.copy(folder / bundle / name, place)
        print(f"done: {folder}", flush=True)
    return folder / "model.pt"


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def main() -> None:
    """Run what is missing, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("AMKD_SHARED_DATA", "../shared/data")).parent
    parser.add_argument("--shared", type=Path, default=default, help="folder with data/")
    parser.add_argument("--output", type=Path, default=Path("runs/multitask"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two data sets, one epoch of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output, data = arguments.output.resolve(), arguments.shared.resolve() / "data"
    bundles = ["kvasir_seg", "aptos2019"] if arguments.smoke else list(DATA)
    tasks: dict[str, Any] = {}
    for bundle in bundles:
        place, settings = DATA[bundle]
        tasks[bundle] = {"dataset_dir": str(data / place), **settings}
        if arguments.smoke:
            tasks[bundle] |= {"max_epochs": 1, "image_size": 64}
    cache = output / "cache"
    for seed in range(arguments.seeds):
        for bundle, settings in tasks.items():
            own = {**settings, "cache_dir": str(cache / bundle)}
            single(bundle, "undistilled", seed, {**own, "teachers": []}, output)
            single(bundle, "distilled", seed, own, output)
        model = shared(bundles, seed, tasks, output, str(cache))
        for bundle, settings in tasks.items():
            start = {"init_from": str(model), "teachers": [], "cache_dir": str(cache / bundle)}
            start["max_epochs"] = max(1, settings["max_epochs"] // 3)
            if bundle == "msd_heart":
                start["network_def#neck_channels"] = 64  # the shared neck's
            single(bundle, "fine_tuned", seed, {**settings, **start}, output)
    rows = {
        f"{bundle}_{label}": Row(bundle, arguments.seeds, f"{bundle}_distilled" if label != "distilled" else None)
        for bundle in bundles
        for label in LABELS
    }
    text = table(rows, output)
    (output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
