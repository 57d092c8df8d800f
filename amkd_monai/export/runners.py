"""Open a written network for answers on the CPU; only the runtime of its format is imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Runner = Callable[[np.ndarray], np.ndarray]
"""Logits of a batch (B, 3, H, W)."""


def runner(name: str, path: Path, threads: int) -> Runner:
    """Open a file of the format ``name`` for so many threads; what runs on torch has torch's own."""
    if name in ("onnx", "ort-int8"):
        return _onnxruntime(path, threads)
    if name in ("openvino", "openvino-int8"):
        return _openvino(path, threads)
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_runner(torch.jit.load(str(path)) if name == "ts" else torch.export.load(str(path)).module())


def _onnxruntime(path: Path, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"image": batch})[0]


def _openvino(path: Path, threads: int) -> Runner:
    import openvino

    # Without the hint, a CPU that has bfloat16 computes in it, and probabilities move by some hundredths.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda batch: request.infer([batch])[0]


def torch_runner(network: Callable[[torch.Tensor], torch.Tensor]) -> Runner:
    """Run a torch network on arrays."""
    import torch

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(batch)).numpy()

    return run
