"""What each part of the method is worth: on polyps with good and bad teachers, on the heart without a good one.

    python benchmarks/ablation.py --bundle kvasir_seg --dataset_dir ../shared/data/Kvasir-SEG --jobs 2    # all, 3 seeds
    python benchmarks/ablation.py --bundle kvasir_seg --only 12_learned                                   # a subset
    python benchmarks/ablation.py --bundle msd_heart

It resumes. Polyps: the teachers are the outside specialist, a frozen ImageNet encoder, one that always says the same,
and one that is confidently wrong. ``12``: 12 labelled images, the rest of the training split unlabelled; ``all``: all
labelled. Heart: the bundle's own ImageNet encoders, whose answers are worse than the student's. Every arm of a bundle
has the same student, recipe, steps, split and seeds. ``default`` is the bundle as it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bundle_runner import BEST_MASKS, ROOT, Setting, main, options
from results import FEATURES_ONLY, HEART, HEART_DATA, HEART_FOLD
from torch import Tensor, nn

FOLDER = "runs/ablation"
FULL: dict[str, Any] = {
    "gate": "learned",
    "losses": {"output": 1.0, "feature": 0.2, "reconstruction": 0.1, "contrastive": 0.1},
    "return_code": "learned",
    "loss_gate": "agreement",
}
"""Everything switched on."""
SCALED = {"loss_gate": "scaled"}
"""The loss gate that weighs nothing anew: what the other gates are compared with."""
FIXED: dict[str, Any] = {
    "gate": "benchmarks.ablation_gates.FixedGate",
    "gate_options": {"weights": {"specialist": 0.4, "lite2": 0.4, "constant": 0.1, "noise": 0.1}},
}
"""Weights of somebody who knows roughly which teachers are good."""


class ConstantTeacher(nn.Module):
    """The easiest teacher: the same answer and the same features for every image."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, 1, H / 4, W / 4) and features (B, 16, H / 16, W / 16)."""
        b, h, w = image.shape[0], image.shape[2], image.shape[3]
        return torch.full((b, 1, h // 4, w // 4), -1.5), torch.ones((b, 16, h // 16, w // 16))


class NoiseTeacher(nn.Module):
    """A confident teacher whose answers have nothing to do with the labels: fixed random filters of the image."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.answer = nn.Conv2d(3, 1, 8, stride=4, padding=2)
            self.features = nn.Conv2d(3, 64, 16, stride=16)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, 1, H / 4, W / 4) and features (B, 64, H / 16, W / 16)."""
        answer = self.answer(image)
        answer = 8 * (answer - answer.mean()) / answer.std()
        return answer, self.features(image)


def write_planted(folder: Path) -> dict[str, str]:
    """Write the planted teachers as TorchScript files; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, network in (("constant", ConstantTeacher()), ("noise", NoiseTeacher())):
        paths[name] = str(folder / f"{name}.ts")
        torch.jit.script(network.eval()).save(paths[name])
    return paths


def polyps(planted: dict[str, str]) -> dict[str, Setting]:
    """Return the arms of kvasir_seg; ``planted``: {name of a bad teacher: its file}."""
    specialist = {"name": "specialist", "kind": "specialist", "image_size": 256}
    good = [specialist, {"name": "lite2", "kind": "timm", "model": "tf_efficientnet_lite2"}]
    bad = [{"name": n, "kind": "specialist", "path": p, "image_size": 128} for n, p in planted.items()]
    every = {"mode": "all"}
    without_decoder = {**FULL, "return_code": "none", "losses": {"output": 1.0, "feature": 0.2, "contrastive": 0.1}}
    without_crd = {**FULL, "losses": {"output": 1.0, "feature": 0.2, "reconstruction": 0.1}}
    arms: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "best_single": (good + bad, {**SCALED, "gate": "benchmarks.ablation_gates.BestSingleGate"}),
        "uniform": (good + bad, {**SCALED, "gate": "uniform", "admission": every}),
        "fixed": (good + bad, {**SCALED, **FIXED, "admission": every}),
        "reliability": (good + bad, {**SCALED, "gate": "reliability"}),
        "reliability_all_admitted": (good + bad, {**SCALED, "gate": "reliability", "admission": every}),
        "default_good_teachers": (good, {}),
        "default": (good + bad, {}),
        "default_features_of_admitted": (good + bad, {"admission": {"features": "admitted"}}),
        "default_without_features": (good + bad, {"losses": {"output": 1.0}}),
        "learned": (good + bad, FULL),
        "learned_all_admitted": (good + bad, {**FULL, "admission": every}),
        "learned_without_decoder": (good + bad, without_decoder),
        "learned_without_crd": (good + bad, without_crd),
        "learned_without_loss_gate": (good + bad, {**FULL, **SCALED}),
        "paper": (good + bad, PAPER),
    }
    common = {"image_size": 128, "split_fractions": [0.5, 0.1, 0.4], "val_interval": 4, **BEST_MASKS}
    result: dict[str, Setting] = {}
    for label, extra in (("12", {"labelled": 12}), ("all", {})):
        base = {**common, "max_epochs": 40, "recipe#min_steps": 1, **extra}
        result[f"{label}_undistilled"] = Setting("kvasir_seg", "Kvasir-SEG", base, teachers=[])
        for name, (teachers, overrides) in arms.items():
            reference = f"{label}_undistilled"
            result[f"{label}_{name}"] = Setting(
                "kvasir_seg", "Kvasir-SEG", {**base, **overrides}, reference, teachers=teachers
            )
    return result


def heart() -> dict[str, Setting]:
    """Return the arms of msd_heart: one fold of five, in which no learning rate was chosen."""
    reference = "heart_undistilled"
    result = {reference: Setting("msd_heart", HEART_DATA, HEART, folds=HEART_FOLD, teachers=[])}
    for name, arm in {"default": {}, "learned": FULL}.items():
        overrides = {**HEART, **FEATURES_ONLY, **arm}
        result[f"heart_{name}"] = Setting("msd_heart", HEART_DATA, overrides, reference, folds=HEART_FOLD)
    return result


PAPER: dict[str, Any] = {
    "gate": "paper",
    "losses": {"output": 0.6, "feature": 0.8, "reconstruction": 0.4, "contrastive": 0.3},
    "loss_gate": "paper",
    "loss_gate_options": {"task": 1.0},
    "return_code": "learned",
    "contrastive": {"temperature": 0.07, "learnable": False, "negatives": 16384},
    "kd_temperature": {"start": 4.0, "end": 1.0},
    "loss_strength": {"warmup": 0.0, "decay": 0.0, "end": 1.0},
    "admission": {"mode": "all"},
}
"""The gates and losses of the published scheme (``bundles/paper.json``) at the recipe and budget of the other arms."""


if __name__ == "__main__":
    parser = options(str(__doc__), FOLDER)
    parser.add_argument("--bundle", choices=("kvasir_seg", "msd_heart"), default="kvasir_seg")
    parser.add_argument("--dataset_dir", type=Path, help="the bundle's data; without, those in the shared folder")
    arguments = parser.parse_args()
    arms = polyps(write_planted(ROOT / FOLDER)) if arguments.bundle == "kvasir_seg" else heart()
    if arguments.dataset_dir is not None:
        arms = {name: replace(arm, data=str(arguments.dataset_dir.resolve())) for name, arm in arms.items()}
    main(arms, arguments)
