"""The script that measures a GPU runs in all its parts; without a GPU, at toy sizes."""

import re
import subprocess
import sys

from helpers import ROOT


def test_every_part_runs_at_toy_sizes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    import gpu

    subprocess.run(["bash", "-n", "benchmarks/gpu.sh"], cwd=ROOT, check=True)
    assert gpu.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    for word in (*gpu.TINY.teachers, "plain step", "cached step", "reading", "synchronisations", "compiled"):
        assert any(word in line for line in rows), word
    figures = [float(f) for line in rows for f in re.findall(r"(\d+\.\d+) (?:ms|plain steps)", line)]
    assert len(figures) >= 4 and min(figures) > 0
    cosines = [float(line.rsplit("| ", 1)[1].strip(" |")) for line in rows if line.startswith(("| retfound", "| usfm"))]
    assert len(cosines) == 2 and 0.99 < min(cosines) < 1
