"""Adaptive multi-teacher knowledge distillation for medical imaging on MONAI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from amkd_monai.export.predict import Predictor

__version__ = "0.1.0"


def load(where: str | Path, revision: str | None = None, int8: bool = False) -> Predictor:
    """Open an exported student, whose ``answer(file)`` is that of the command `predict`, without torch.

    Args:
        where: folder that `export` made, else a ValueError, or OWNER/NAME on the Hugging Face hub, else an OSError.
        revision: of the repository: branch, tag or commit.
        int8: use the network of 8 bits.
    """
    from amkd_monai.export.predict import Predictor
    from amkd_monai.export.repositories import located

    return Predictor(located(where, revision), int8)
