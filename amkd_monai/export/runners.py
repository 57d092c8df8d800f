"""Opens an exported network for prediction on the CPU; imports only the runtime of its format.

``python -m amkd_monai.export.runners FORMAT FILE IMAGE.npy THREADS`` answers one image and prints its peak memory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amkd_monai.memory import own_peak

if TYPE_CHECKING:
    import torch

Runner = Callable[[np.ndarray], np.ndarray]
"""Logits of a batch (B, C, H, W), or of patches (B, C, D, H, W)."""


def runner(name: str, path: Path, threads: int) -> Runner:
    """Open a file of the format ``name`` for so many threads; torch's formats use torch's own number."""
    if name in ("onnx", "ort-int8"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {"image": batch})[0]
    if name in ("openvino", "openvino-int8"):
        import openvino

        # Without the hint, a CPU that has bfloat16 computes in it, and probabilities move by some hundredths.
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
        return lambda batch: request.infer([batch])[0]
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_runner(torch.jit.load(str(path)) if name == "ts" else torch.export.load(str(path)).module())


def torch_runner(network: Callable[[torch.Tensor], torch.Tensor]) -> Runner:
    """Run a torch network on arrays of a batch."""
    import torch

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(batch)).numpy()

    return run


def peak_memory(name: str, path: Path, image: np.ndarray, threads: int) -> float:
    """Peak memory, MB, of a fresh process that runs one image or patch through a file; a RuntimeError if it fails."""
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
    runner(sys.argv[1], Path(sys.argv[2]), int(sys.argv[4]))(np.load(sys.argv[3]))
    print(own_peak())
