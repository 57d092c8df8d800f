"""The foundation teachers' own classes at a width and depth that cost nothing."""

import dataclasses

import torch

from amkd_monai.data.datasets import TASKS
from amkd_monai.teachers.base import build_teacher

SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 4}
VIT = {"sizes": SIZES, "weights": "random"}
TINY = {
    "medsam": {
        "kind": "medsam",
        "image_size": 64,
        "sizes": {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": [1], "out_chans": 32},
        "weights": "random",
    },
    "retfound": {"kind": "retfound", "framing": "squash", "image_size": 64, **VIT},
    "retfound_dinov2": {"kind": "retfound", "variant": "dinov2_meh", "image_size": 56, **VIT},
    "usfm": {"kind": "usfm", "image_size": 64, "taps": [0, 1, 2, 3], **VIT},
    "usfm_upernet": {"kind": "usfm", "image_size": 64, "taps": [0, 1, 2, 3], "num_classes": 2, **VIT},
    "biomedparse": {
        "kind": "biomedparse",
        "image_size": 128,
        "token_ids": [[49406, 6833, 335, 530, 13476, 20018, 49407]],  # "polyp in endoscopy"
        "sizes": {
            "backbone": 16,
            "depths": [2, 1, 1, 1],
            "width": 64,
            "heads": 4,
            "hidden": 64,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "queries": 12,
            "text_layers": 2,
        },
        "weights": "random",
    },
}
"""Descriptions without a name."""


def tiny(which, **options):
    """Build one."""
    return build_teacher({"name": which, **TINY[which], **options})


def official_state(which, teacher=None):
    """The state dict of a tiny teacher, in the layout of its official file."""
    network = (teacher or tiny(which)).network
    state = {k: v.clone() for k, v in network.state_dict().items()}
    if which == "usfm":
        return {k.removeprefix("backbone."): v for k, v in state.items()} | {"mask_token": torch.zeros(1, 1, 48)}
    if which == "retfound":
        return state | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 48)}
    if which == "retfound_dinov2":
        return {f"backbone.{k}": v for k, v in state.items()} | {"backbone.mask_token": torch.zeros(1, 48)}
    return state


OFFICIAL = {
    "medsam": "medsam_vit_b.pth",
    "usfm": "USFM_latest.pth",
    "retfound": "RETFound_mae_natureCFP.pth",
    "biomedparse": "biomedparse_v1.pt",
}
"""What the authors call their files."""


def write_official(folder):
    """Write the four files, in the official layouts, into a folder."""
    folder.mkdir(exist_ok=True)
    for which, file in OFFICIAL.items():
        state = official_state(which)
        torch.save({"model": state} if which == "retfound" else state, folder / file)
    return folder


def tiny_tasks(monkeypatch):
    """Let all data sets take foundation teachers at tiny widths; everything else is theirs."""
    sizes = {
        which: {k: v for k, v in TINY[which].items() if k in ("image_size", "sizes", "taps")} for which in OFFICIAL
    }
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, dataclasses.replace(task, teacher_options=sizes))
