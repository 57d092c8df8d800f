"""Makes the tests' own helpers importable and keeps every test off the network and on one thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for folder in (Path(__file__).parent, Path(__file__).parent / "bundles"):
    sys.path.insert(0, str(folder))
