"""Write the student in each format."""

import base64
import copy
import importlib.util
import io
import logging
import lzma
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.torchscript_utils import save_net_with_metadata
from torch import nn

FORMATS = {
    "ts": "model.ts",
    "pt2": "model.pt2",
    "onnx": "model.onnx",
    "ort-int8": "model_int8.onnx",
    "openvino": "model.xml",
    "openvino-int8": "model_int8.xml",
}
"""File in ``models/`` by format; OpenVINO keeps the weights next to its file, as ``.bin``."""
DEFAULT = "ts,pt2,onnx,ort-int8"
PAGE, REPOSITORIES = "web", ("hub", "triton")
"""A page, and model repositories, with the ONNX networks, made when everything else is written."""
MADE_FROM = {"ort-int8": "onnx", "openvino": "onnx", "openvino-int8": "ort-int8"}
"""Formats that are made from another one."""
QUANTISED = ("Conv", "Add", "Clip")  # nodes of 8 bits; the linear head of classes stays in floats
FLAT = ("ort-int8", "openvino-int8", PAGE)
"""Formats that a 3D student has not: its 8 bits are not calibrated, and a page slides no window over a volume."""
RARE = 1e-4  # share of the values of a tensor in an image, on each side, that 8 bits need not span
STRIDE = 32  # height and width of what an exported network takes are multiples of it


def chosen_formats(text: str) -> list[str]:
    """Read a list such as ``ts,onnx``; an unknown format, or one without its package, is a ValueError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*FORMATS, PAGE, *REPOSITORIES):
            raise ValueError(f"Unknown format '{name}': use some of {', '.join((*FORMATS, PAGE, *REPOSITORIES))}.")
        extras = {} if name in ("ts", "pt2") else {"onnx": "export", "onnxruntime": "export"}
        for package, extra in (extras | ({"openvino": "openvino"} if name.startswith("openvino") else {})).items():
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"The format {name} needs {package}: run `pip install 'amkd_monai[{extra}]'`.")
    if {*REPOSITORIES} & {*names} or (PAGE in names and not {"onnx", "ort-int8"} & {*names}):
        names.append("onnx")
    return [name for name in (*FORMATS, PAGE, *REPOSITORIES) if name in names or name == "ts"]


def of_volumes(names: Sequence[str], are_chosen: bool) -> list[str]:
    """Return the formats of a 3D student among some; where they ``are_chosen`` by the user, others are a ValueError."""
    if are_chosen and (wrong := [name for name in names if name in FLAT]):
        raise ValueError(f"A 3D student has no {' and no '.join(wrong)}: leave out {', '.join(FLAT)} of --formats.")
    return [name for name in names if name not in FLAT]


def is_int8(name: str) -> bool:
    """Whether a format computes in 8 bits."""
    return name.endswith("int8")


def check_size(names: Sequence[str], size: Sequence[int]) -> None:
    """Refuse, by a ValueError, formats but TorchScript of an input (H, W) whose sides are no multiples of 32."""
    others = [name for name in names if name != "ts"]
    if others and any(side % STRIDE for side in size):
        given, names = f"{size[0]} x {size[1]}", ", ".join(others)
        raise ValueError(f"{names} take multiples of {STRIDE}, but the student's input is {given}: use --formats ts.")


def with_fixed_padding(student: nn.Module) -> nn.Module:
    """Copy a network with timm's size-dependent padding replaced by the constant one it is at multiples of 32."""
    result = copy.deepcopy(student).eval()
    for name, module in list(result.named_modules()):
        if type(module).__name__ == "Conv2dSame":
            kernel, stride = module.kernel_size[0], module.stride[0]
            how = {"groups": module.groups, "bias": module.bias is not None}
            conv = nn.Conv2d(module.in_channels, module.out_channels, kernel, stride, **how)
            conv.load_state_dict(module.state_dict())
            padding = nn.ZeroPad2d(((kernel - stride) // 2, (kernel - stride + 1) // 2) * 2)
            result.set_submodule(name, nn.Sequential(padding, conv))
    return result.eval()


def _example(student: nn.Module, patch: Sequence[int] | None) -> tuple[torch.Tensor]:
    """The input with which a network is traced: exporters take sides of one stride for constants."""
    return (torch.zeros(2, *(patch or (getattr(student, "in_channels", 3), 2 * STRIDE, 3 * STRIDE))),)


def scripted(network: nn.Module) -> torch.jit.ScriptModule:
    """The network as TorchScript; a ValueError if torch does not take it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.script(network)
    except Exception as error:  # what a compiler raises
        name, reason = type(getattr(network, "network", network)).__name__, str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} cannot be exported, torch.jit.script refuses it ({reason}): use another network."
        ) from error


def network_text(student: nn.Module) -> str:
    """The network as TorchScript without weights, compressed, in base 64: a definition that needs no package."""
    empty = copy.deepcopy(student).eval()
    for value in empty.state_dict().values():
        value.zero_()
    return base64.b64encode(lzma.compress(_without_sources(scripted(empty).save_to_buffer()))).decode()


def _without_sources(script: bytes) -> bytes:
    """TorchScript without the lines of code that it was made from, and the paths of this machine with them."""
    lean = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(script)) as source, zipfile.ZipFile(lean, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry))
    return lean.getvalue()


def write_pt2(student: nn.Module, path: Path, patch: Sequence[int] | None = None) -> None:
    """Write an exported program of dynamic batch, height and width, or of patches (C, D, H, W) of one size."""
    largest = {"batch": 1024, "height": 128, "width": 128}
    batch, height, width = (torch.export.Dim(name, min=1, max=n) for name, n in largest.items())
    shapes = ({0: batch} if patch else {0: batch, 2: STRIDE * height, 3: STRIDE * width},)
    given = with_fixed_padding(student), _example(student, patch)
    program = torch.export.export(*given, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, str(path))


def write_onnx(student: nn.Module, path: Path, patch: Sequence[int] | None = None) -> None:
    """Write ONNX, ``image`` to ``pred``, with dynamic batch, height and width, or patches (C, D, H, W) of one size."""
    spatial = {} if patch else {2: "height", 3: "width"}
    has_map = getattr(student, "temperature", None) is None
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            with_fixed_padding(student),
            _example(student, patch),
            str(path),
            input_names=["image"],
            output_names=["pred"],
            dynamic_axes={"image": {0: "batch", **spatial}, "pred": {0: "batch", **(spatial if has_map else {})}},
            opset_version=18,
            dynamo=False,
        )


def write_int8(onnx_file: Path, batches: Sequence[np.ndarray], path: Path) -> None:
    """Quantise ONNX to 8 bits by ONNX Runtime, calibrated on ``batches`` (B, 3, H, W): static, QDQ, per channel.

    Activations get the range of all but the rarest values of each image. The first convolution stays in floats: it
    costs next to no time, and its error would go through all others. So do the answers, calibrated logits of classes.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,unused-ignore]
        rest = iter([{"image": batches[0]}])  # ranges are given, so one image is enough

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it warns on the root logger about what was just done
    try:
        with tempfile.TemporaryDirectory() as folder:
            quant_pre_process(str(onnx_file), prepared := f"{folder}/prepared.onnx", skip_symbolic_shape=True)
            model = onnx.load(prepared)
            stem = next(node.name for node in model.graph.node if node.op_type == "Conv")
            last = next(node.name for node in model.graph.node if node.output[0] == model.graph.output[0].name)
            ranges, scales = _calibrate(model, stem, batches)
            fixed = {"zero_point": np.int8(0), "quant_type": quantization.QuantType.QInt8, "axis": 0}
            given = {name: [{"rmin": low, "rmax": high}] for name, (low, high) in ranges.items()}
            given |= {name: [fixed | {"scale": scale} for scale in values] for name, values in scales.items()}
            quantization.quantize_static(
                model,
                str(path),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=[*QUANTISED],
                nodes_to_exclude=[stem, last],
                extra_options={"TensorQuantOverrides": given},
            )
    finally:
        root.setLevel(level)


def _calibrate(
    model: Any, stem: str, batches: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the ranges (2,) of activations and the scales (out,) of convolutions' weights, by the tensor's name.

    x86 CPUs without VNNI add two neighbouring products of 8 bits in 16: with activations up to 255, two weights of one
    sign must not exceed 128 together. Scales keep to that, so that every CPU gives the same sums. Depthwise
    convolutions are summed in 32 bits everywhere. What rounding the weights adds in the mean is taken from the biases.
    """
    import onnxruntime
    from onnx import ModelProto, ValueInfoProto, numpy_helper

    nodes = [node for node in model.graph.node if node.op_type in QUANTISED]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    names = sorted({n for node in nodes for n in (*node.input, *node.output) if n and n not in tensors})
    opened = ModelProto.FromString(model.SerializeToString())
    del opened.graph.output[:]
    opened.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    lows, highs, means = (dict[str, Any]() for _ in range(3))
    for batch in batches:
        for name, value in zip(names, session.run(names, {"image": batch}), strict=True):
            low, high = np.quantile(value, (RARE, 1 - RARE))
            lows[name], highs[name] = min(low, lows.get(name, low)), max(high, highs.get(name, high))
            means[name] = means.get(name, 0) + value.mean(tuple({*range(value.ndim)} - {1})) / len(batches)
    ranges = {name: np.array((lows[name], highs[name]), np.float32) for name in names}
    scales = dict[str, np.ndarray]()
    for node in nodes:
        if node.op_type != "Conv" or node.name == stem:
            continue
        weight = numpy_helper.to_array(tensors[node.input[1]])
        rows, mean = weight.reshape(len(weight), -1), means[node.input[0]].reshape(-1, weight.shape[1])  # of each group
        pairs = rows[..., None]
        if weight.shape[1] > 1:
            pairs = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)
        largest = np.maximum(pairs.clip(min=0).sum(2), -pairs.clip(max=0).sum(2)).max(1)
        scale = scales[node.input[1]] = (np.where(largest > 0, largest, 1) / 127).astype(np.float32)
        error = ((rows / scale[:, None]).round() * scale[:, None] - rows).reshape(*weight.shape[:2], -1).sum(2)
        added = (error * mean.repeat(len(rows) // len(mean), 0)).sum(1)
        bias = numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 else np.zeros(len(rows))
        model.graph.initializer.append(numpy_helper.from_array((bias - added).astype(np.float32), f"{node.name}_bias"))
        node.input[:] = [*node.input[:2], f"{node.name}_bias"]
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    return ranges, scales


def write(
    name: str,
    student: nn.Module,
    folder: Path,
    calibration: Sequence[Any],
    metadata: Mapping[str, Any] | None = None,
    patch: Sequence[int] | None = None,
) -> Path:
    """Write one format of a student in evaluation mode into a folder and return the file.

    Uses the source format (:data:`MADE_FROM`) in ``folder`` if present; otherwise writes it to a temporary directory.
    ``calibration`` are batches (1, 3, H, W) for 8 bits; ``metadata`` is put into the TorchScript file, for
    ``monai.data.load_net_with_metadata``; ``patch`` is (C, D, H, W) of a 3D student.
    """
    path = folder / FORMATS[name]
    if name == "ts":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_net_with_metadata(scripted(student), str(path), include_config_vals=False, meta_values=metadata)
        path.write_bytes(_without_sources(path.read_bytes()))
    elif name == "pt2":
        write_pt2(student, path, patch)
    elif name == "onnx":
        write_onnx(student, path, patch)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            given = folder / FORMATS[MADE_FROM[name]]
            if not given.is_file():
                given = write(MADE_FROM[name], student, Path(temporary), calibration, patch=patch)
            if name == "ort-int8":
                write_int8(given, calibration, path)
            else:
                import openvino

                openvino.save_model(openvino.Core().read_model(given), path, compress_to_fp16=False)
    return path
