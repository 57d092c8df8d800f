"""Names of the files that a run leaves for its report."""

from __future__ import annotations

import re
from pathlib import Path

PREVIEWS = "previews"
TEACHERS = "teachers.npz"
FEATURES = "features.npz"


def preview_file(output_dir: str | Path, case: str) -> Path:
    """Where the preview of a case lies."""
    return Path(output_dir) / PREVIEWS / (re.sub(r"[^\w.()-]+", "_", case) + ".npz")
