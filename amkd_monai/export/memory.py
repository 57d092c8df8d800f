"""What a network takes of memory where it is used: the peak of a fresh process that answers one image."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from amkd_monai.memory import own_peak


def peak_memory(name: str, path: Path, image: np.ndarray, threads: int) -> float:
    """Run one image through a written format in a process of its own.

    Args:
        name: of the format.
        path: its file.
        image: (1, 3, H, W).
        threads: of the runtime.

    Returns:
        Largest resident memory of that process, the interpreter and the runtime included, MB.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        array = Path(folder) / "image.npy"
        np.save(array, image)
        command = [sys.executable, "-m", __name__, name, str(path), str(array), str(threads)]
        ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"The format {name} does not run in a fresh process: {reason}.")
    return float(ended.stdout)


if __name__ == "__main__":
    from amkd_monai.export.runners import runner

    runner(sys.argv[1], Path(sys.argv[2]), int(sys.argv[4]))(np.load(sys.argv[3]))
    print(own_peak())
