"""Makes the tests' own helpers importable and keeps every test off the network and on one thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for folder in (Path(__file__).parent, Path(__file__).parent / "bundles"):
    sys.path.insert(0, str(folder))

FIRST = ("export", "label", "bundles", "engines", "runs", "teachers")
"""Folders of the longest tests, which two workers share best from the start. The export comes first of all: torch's
ONNX exporter has died in a process that had run hundreds of other tests."""


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: next((n for n, folder in enumerate(FIRST) if folder == item.path.parent.name), len(FIRST))
    )
