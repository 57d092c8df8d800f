"""Runs bundles in the test process: one import of MONAI, many runs."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT
from monai.bundle import ConfigWorkflow

from amkd_monai.data.datasets import TASKS

ALL_BUNDLES = sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/metadata.json"))
SHARED = "multitask"
PAPER = ROOT / "bundles" / "paper.json"
BUNDLES = [name for name in ALL_BUNDLES if name != SHARED]
SEGMENTATION = [name for name in BUNDLES if TASKS[name].kind == "segmentation"]

SMALL: dict[str, dict[str, Any]] = {
    "busi": {"image_size": 64, "max_epochs": 2},
    "covid": {"image_size": 64, "max_epochs": 2},
    "kvasir_seg": {"image_size": 64, "max_epochs": 2},
    "aptos2019": {"image_size": 64, "max_epochs": 2},
    "isic2017": {"image_size": 64, "max_epochs": 2},
    "msd_heart": {"spacing": [2.5, 5.0, 5.0], "volume_size": [16, 48, 32], "max_epochs": 2, "val_interval": 1},
}
"""Overrides that make a run on phantoms take seconds."""

SMALL[SHARED] = {
    "tasks": {
        name: {
            "bundle": name,
            **{key: value for key, value in small.items() if key not in ("max_epochs", "val_interval")},
            "recipe#batch_size": 4,
            **({"recipe#min_steps": 4} if name in ("msd_heart", "aptos2019") else {}),
        }
        for name, small in SMALL.items()
    },
    "max_epochs": 2,
    "admission": {"mode": "none"},
}


def settings(bundle: str, folder: Path, cache: Path, **overrides: Any) -> dict[str, Any]:
    """Return small settings with all output under a folder."""
    places = {"output_dir": str(folder / "eval"), "ckpt_dir": str(folder / "models"), "cache_dir": str(cache)}
    return {"bundle_root": str(ROOT / "bundles" / bundle), **SMALL[bundle], **places, **overrides}


def workflow(bundle: str, configs: tuple[str, ...], values: dict[str, Any]) -> ConfigWorkflow:
    """Build and initialise a workflow from a bundle's configs."""
    folder = ROOT / "bundles" / bundle / "configs"
    if configs[0] == "inference":
        values = {k: v for k, v in values.items() if k not in TRAINING_ONLY}
    built = ConfigWorkflow(
        workflow_type="infer" if configs[0] == "inference" else "train",
        config_file=[str(PAPER if name == "paper" else folder / f"{name}.json") for name in configs],
        meta_file=str(folder / "metadata.json"),
        logging_file=False,
        **values,
    )
    built.initialize()
    return built


TRAINING_ONLY = (
    "tasks",
    "only",
    "max_epochs",
    "val_interval",
    "teachers",
    "admission",
    "seed",
    "resume",
    "labelled",
    "gate",
    "losses",
    "loss_gate",
    "return_code",
)


def run(bundle: str, configs: tuple[str, ...], values: dict[str, Any]) -> ConfigWorkflow:
    """Run a workflow to its end."""
    built = workflow(bundle, configs, values)
    built.run()
    built.finalize()
    return built


def run_ranks(count: int, bundle: str, values: dict[str, Any]) -> None:
    """Train in forked processes, whose environment is what torchrun gives; an error of one of them is raised."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (count, port, bundle, values), nprocs=count, start_method="fork")


def _rank(rank: int, count: int, port: int, bundle: str, values: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(bundle, ("train", "multi_gpu_train"), values)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content
