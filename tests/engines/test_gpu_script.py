"""The script that measures a GPU runs in all its parts; without a GPU, at toy sizes."""

import os
import re
import subprocess
import sys

from helpers import ROOT


def test_every_part_runs_at_toy_sizes():
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", "--tiny"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, check=True)
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    for word in ("retfound", "usfm", "plain step", "cached step", "reading", "synchronisations", "compiled"):
        assert any(word in line for line in rows), word
    figures = [float(f) for line in rows for f in re.findall(r"(\d+\.\d+) (?:ms|plain steps)", line)]
    assert len(figures) >= 4 and min(figures) > 0
    cosines = [float(line.rsplit("| ", 1)[1].strip(" |")) for line in rows if line.startswith(("| retfound", "| usfm"))]
    assert len(cosines) == 2 and 0.99 < min(cosines) < 1
