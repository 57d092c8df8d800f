"""The student as a model repository of the Triton inference server: format ``triton``."""

import json
import shutil
from pathlib import Path

from amkd_monai.storage import read_json

LARGEST_BATCH, LONGEST_WAIT = 32, 2000
"""Images that the server puts into one batch, and microseconds that an image waits for others of its size."""


def write_triton(folder: Path, name: str) -> None:
    """Write ``triton/`` into the folder of an export: each ONNX network as a model that takes batches.

    Args:
        folder: with ``configs/predict.json`` and the networks.
        name: of the float model; that of 8 bits is ``<name>_int8``.
    """
    predict, metadata = (read_json(folder / "configs" / f"{file}.json") for file in ("predict", "metadata"))
    channels = metadata["network_data_format"]["inputs"]["image"]["num_channels"]
    count = len(predict["classes"])
    answers = {"segmentation": [count, -1, -1], "classification": [count], "multilabel": [2, count]}
    shapes = {"image": [channels, -1, -1], "pred": answers[predict["kind"]]}
    image, pred = (f"{{ name: {json.dumps(of)} data_type: TYPE_FP32 dims: {dims} }}" for of, dims in shapes.items())
    for form, model in predict["models"].items():
        called = f"{name}_int8" if form == "ort-int8" else name
        target = folder / "triton" / called
        (target / "1").mkdir(parents=True)
        shutil.copyfile(folder / model, target / "1" / "model.onnx")
        lines = [
            f"name: {json.dumps(called)}",
            'backend: "onnxruntime"',
            f"max_batch_size: {LARGEST_BATCH}",
            f"input [ {image} ]",
            f"output [ {pred} ]",
            f"dynamic_batching {{ max_queue_delay_microseconds: {LONGEST_WAIT} }}",
        ]
        (target / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
