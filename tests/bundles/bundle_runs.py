"""Runs bundles in the test process: one import of MONAI, many runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from helpers import ROOT
from monai.bundle import ConfigWorkflow
from PIL import Image

from amkd_monai.data.datasets import TASKS
from amkd_monai.files.names import file_id

ALL_BUNDLES = sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/metadata.json"))
SHARED = "multitask"
PAPER = ROOT / "bundles" / "paper.json"
BUNDLES = [name for name in ALL_BUNDLES if name != SHARED]
SEGMENTATION = [name for name in BUNDLES if TASKS[name].kind == "segmentation"]

SMALL: dict[str, dict[str, Any]] = {
    "busi": {"image_size": 64, "max_epochs": 2, "recipe#min_steps": 1},
    "covid": {"image_size": 64, "max_epochs": 2, "recipe#min_steps": 1},
    "kvasir_seg": {"image_size": 64, "max_epochs": 2, "recipe#min_steps": 1},
    "aptos2019": {"image_size": 64, "max_epochs": 2, "recipe#min_steps": 8},
    "isic2017": {"image_size": 64, "max_epochs": 2, "recipe#min_steps": 8},
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


COMPARED = [{"name": f"imagenet_lite{n}", "kind": "timm", "model": f"tf_efficientnet_lite{n}"} for n in (1, 2)]
"""The bundles' ImageNet teachers, whose outputs are compared with a student."""

PHANTOMS = tempfile.TemporaryDirectory()


def settings(bundle: str, folder: Path, cache: Path, **overrides: Any) -> dict[str, Any]:
    """Return small settings with all output under a folder; a cache gets phantoms, which are generated once.

    The teachers are ImageNet encoders, or where images without labels take part the bundles' own choice.
    """
    alone = [] if overrides.get("dataset_dir") else [(overrides.get("task", bundle), Path(cache))]
    names = overrides.get("only") or overrides.get("tasks", SMALL[SHARED]["tasks"])
    several = [(name, Path(cache) / name) for name in names]
    for task, place in several if bundle == SHARED else alone:
        if task in TASKS and TASKS[task].phantom and not (target := place / "phantoms" / TASKS[task].folder).exists():
            shutil.copytree(TASKS[task].write_phantom(PHANTOMS.name), target)
    places = {"output_dir": str(folder / "eval"), "ckpt_dir": str(folder / "models"), "cache_dir": str(cache)}
    teachers = {} if "labelled" in overrides or "unlabelled" in overrides else {"teachers": "imagenet"}
    return {"bundle_root": str(ROOT / "bundles" / bundle), **SMALL[bundle], **teachers, **places, **overrides}


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
    "recipe#min_steps",
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


OVERLAYS = {"covid_volumes": ("covid", "volumes"), "heart_patches": ("msd_heart", "volumes3d")}
"""Bundle and overlay of the students that are trained by an overlay."""


def small_student(task: str, folder: Path) -> dict[str, Any]:
    """Train and evaluate a student of phantoms without teachers; return its settings."""
    bundle, overlay = OVERLAYS.get(task, (task, ""))
    values = settings(bundle, folder, folder / "cache", teachers=[])
    if task == "msd_heart":
        values["volume_size"] = [16, 64, 32]  # multiples of 32, as exports need
    if task == "heart_patches":  # sides that are no multiples of 32, and volumes of more and less than a patch
        values |= {"volume_size": [20, 48, 40], "patch_slices": 16, "network_def#network#init_filters": 8}
    if task == "covid_volumes":
        values |= {"spacing": [8.0, 8.0, 8.0], "volume_size": [-1, 64, 64], "max_epochs": 8}
    configs = ("train", overlay) if overlay else ("train",)
    run(bundle, configs, values)
    run(bundle, (*configs, "evaluate", *([f"{overlay}_evaluate"] if overlay else [])), values)
    return values


def check_masks(folder: Path, items: Iterable[dict[str, Any]], dimensions: int) -> None:
    """Every image has a mask on its own grid."""
    written = {p.name.split("_mask.")[0]: p for p in folder.iterdir() if p.is_file()}
    assert written.keys() == {file_id(Path(item["image"])) for item in items}
    for item in items:
        path = written[file_id(Path(item["image"]))]
        if dimensions == 2:
            source, mask = Image.open(item["image"]), Image.open(path)
            assert mask.size == source.size and mask.size[0] != mask.size[1]
            assert set(np.unique(np.asarray(mask))) <= {0, 255}
        else:
            source, mask = nib.load(item["image"]), nib.load(path)
            assert mask.shape == source.shape
            np.testing.assert_allclose(mask.affine, source.affine, atol=1e-5)
            assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


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
