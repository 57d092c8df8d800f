"""Write the student in each format, and run what was written."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FORMATS = {
    "ts": "model.ts",
    "pt2": "model.pt2",
    "onnx": "model.onnx",
    "ort-int8": "model_int8.onnx",
}
"""File in ``models/`` by format."""
OPENVINO = ("openvino", "openvino-int8")
DEFAULT_FORMATS = "ts,pt2,onnx,ort-int8"
STRIDE = 32
"""Height and width of what an exported network takes are multiples of it."""

Runner = Callable[[np.ndarray], np.ndarray]
"""Logits of a batch (B, 3, H, W)."""


def chosen_formats(text: str) -> list[str]:
    """Read a list such as ``ts,onnx``.

    Raises:
        ValueError: an unknown format, or one whose package is not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name in OPENVINO:
            if importlib.util.find_spec("openvino") is None:
                raise ValueError(f"The format {name} needs openvino, which is not installed: leave {name} out.")
            raise ValueError(f"The format {name} is not offered yet: OpenVINO reads the onnx format, use that.")
        if name not in FORMATS:
            raise ValueError(f"Unknown format '{name}': use some of {', '.join(FORMATS)}.")
        for package in ("onnx", "onnxruntime") if name in ("onnx", "ort-int8") else ():
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"The format {name} needs {package}: run `pip install 'amkd_monai[export]'`.")
    return [name for name in FORMATS if name in names or name == "ts"]


def check_size(names: Sequence[str], size: Sequence[int]) -> None:
    """Check that a network's input, height and width, suits the formats.

    Raises:
        ValueError: a format but TorchScript is asked for, and a side is no multiple of 32.
    """
    others = [name for name in names if name != "ts"]
    if others and any(side % STRIDE for side in size):
        raise ValueError(
            f"The student's input is {size[0]} x {size[1]}, but {', '.join(others)} take multiples of {STRIDE} alone: "
            "train at such a size, or export with --formats ts."
        )


def with_fixed_padding(student: nn.Module) -> nn.Module:
    """Copy a network with timm's size-dependent padding replaced by the constant one it is at multiples of 32."""
    result = copy.deepcopy(student).eval()
    for name, module in list(result.named_modules()):
        if type(module).__name__ != "Conv2dSame":
            continue
        kernel, stride = module.kernel_size[0], module.stride[0]
        conv = nn.Conv2d(
            module.in_channels, module.out_channels, kernel, stride, groups=module.groups, bias=module.bias is not None
        )
        conv.load_state_dict(module.state_dict())
        total = kernel - stride
        padding = nn.ZeroPad2d((total // 2, total - total // 2) * 2)
        result.set_submodule(name, nn.Sequential(padding, conv))
    return result.eval()


def write_torchscript(student: nn.Module, path: Path) -> None:
    """Write TorchScript; it takes any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(student).save(str(path))


def write_pt2(student: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write an exported program of dynamic batch, height and width."""
    dim = torch.export.Dim
    height, width = dim("height", min=1, max=128), dim("width", min=1, max=128)
    axes = {0: dim("batch", min=1, max=1024), 2: STRIDE * height, 3: STRIDE * width}
    program = torch.export.export(
        with_fixed_padding(student), (example.repeat(2, 1, 1, 1),), dynamic_shapes={"image": axes}, strict=False
    )
    torch.export.save(program, str(path))


def write_onnx(student: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write ONNX, ``image`` (B, 3, H, W) to ``pred``, with dynamic batch, height and width."""
    spatial = {2: "height", 3: "width"}
    has_map = getattr(student, "temperature", None) is None
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            with_fixed_padding(student),
            (example,),
            str(path),
            input_names=["image"],
            output_names=["pred"],
            dynamic_axes={"image": {0: "batch", **spatial}, "pred": {0: "batch", **(spatial if has_map else {})}},
            opset_version=18,
            dynamo=False,
        )


def write_int8(onnx_file: Path, batches: Iterable[np.ndarray], path: Path) -> None:
    """Quantise ONNX to 8 bits by ONNX Runtime: static, QDQ, weights per channel.

    The first convolution stays in floats: it costs next to no time, and its error would go through all others.

    Args:
        onnx_file: the float network.
        batches: calibration input (B, 3, H, W).
        path: file to write.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"image": batch}

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it warns on the root logger about what was just done
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(onnx_file), str(prepared), skip_symbolic_shape=True)
            stem = next(node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv")
            quantize_static(
                str(prepared),
                str(path),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "Add", "Clip"],  # the linear head of classes stays in floats
                nodes_to_exclude=[stem],
            )
    finally:
        root.setLevel(level)


def write(name: str, student: nn.Module, example: torch.Tensor, folder: Path, calibration: Sequence[Any]) -> Path:
    """Write one format into a folder and return the file; ``calibration`` serves ``ort-int8`` alone."""
    path = folder / FORMATS[name]
    if name == "ts":
        write_torchscript(student, path)
    elif name == "pt2":
        write_pt2(student, example, path)
    elif name == "onnx":
        write_onnx(student, example, path)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            floats = Path(temporary) / "model.onnx"
            write_onnx(student, example, floats)
            write_int8(floats, calibration, path)
    return path


def runner(name: str, path: Path) -> Runner:
    """Open a written file for answers on the CPU."""
    if name in ("onnx", "ort-int8"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {"image": batch})[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.jit.load(str(path)) if name == "ts" else torch.export.load(str(path)).module()
    return torch_runner(network)


def torch_runner(network: Callable[[torch.Tensor], torch.Tensor]) -> Runner:
    """Run a torch network on arrays."""

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(batch)).numpy()

    return run
