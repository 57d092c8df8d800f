"""What several test modules share."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent


def without(what: str, remedy: str) -> NoReturn:
    """End a test that lacks something: failed in CI, unless `.ci/run` could not get that, and skipped elsewhere."""
    text = f"{what} is missing: {remedy}"
    if os.environ.get("CI") == "true" and what not in os.environ.get("AMKD_WITHOUT", "").split():
        pytest.fail(text)
    pytest.skip(text)


def shared_data(*parts: str) -> Path:
    """Return a path in the folder of real data; without it the test fails in CI and is skipped elsewhere."""
    folder = Path(os.environ.get("AMKD_SHARED_DATA", "../shared/data"))
    path = (ROOT / folder if not folder.is_absolute() else folder).joinpath(*parts)
    return path if path.exists() else without(str(path), "set AMKD_SHARED_DATA")


def needs(module: str) -> ModuleType:
    """Import a module of an extra; without it the test fails in CI and is skipped elsewhere."""
    if module in sys.modules and sys.modules[module] is None:
        del sys.modules[module]  # held back by conftest.py
    if os.environ.get("CI") == "true":
        return importlib.import_module(module)
    imported: ModuleType = pytest.importorskip(module)
    return imported


def case_metrics(pred, reference, classes, spacing, tolerance, names=None, regions=None):
    """Rows of a case whose classes are given by their number or names, without its id."""
    from amkd_monai.data.datasets import Task
    from amkd_monai.metrics.segmentation import mask_rows

    named = ("background", *(names or (f"class_{n}" for n in range(1, classes))))
    task = Task("task", named, "unknown", "folder", (), regions=regions or {}, nsd_tolerance=tolerance)
    return [{k: v for k, v in row.items() if k != "id"} for row in mask_rows(task, "case", pred, reference, spacing)]
