"""The student as a model repository: of the Hugging Face hub, read back and pushed, and of the Triton server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amkd_monai.storage import atomic_write_json, read_json

if TYPE_CHECKING:
    from amkd_monai.export.source import Source

WEIGHTS, CONFIG = "model.safetensors", "config.json"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
ANSWERING = ["configs/predict.json", "models/*.onnx"]  # files of a repository that prediction reads
LARGEST_BATCH, PATCHES, LONGEST_WAIT = 32, 4, 2000
"""Images, and patches of volumes, that the server puts into one batch, and microseconds that one waits for others."""


def write_hub(folder: Path, source: Source) -> None:
    """Put what the hub looks for into the folder of an export: weights as safetensors, ``config.json``, model card."""
    from safetensors.torch import save

    predict, metadata = _described(folder)
    state = {name: value.contiguous() for name, value in source.state.items()}
    (folder / WEIGHTS).write_bytes(save(state, {"format": "pt"}))  # its own `save_file` makes it private to the user
    config = {
        "architectures": [source.network["_target_"].rpartition(".")[2]],
        "network": source.network,
        "id2label": dict(enumerate(predict["classes"])),
        "preprocessing": predict["steps"],
        **({"window": source.window} if source.window else {}),
    }
    atomic_write_json(folder / CONFIG, config)
    card = (folder / "docs" / "README.md").read_text(encoding="utf-8")
    for name in ("data_license.txt", "export.json"):
        card = card.replace(f"`{name}`", f"`docs/{name}`")
    fields = front_matter(metadata, predict, source.data.is_phantom, bool(source.taught))
    head = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{head}---\n{card}", encoding="utf-8")


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return read_json(folder / "configs" / "predict.json"), read_json(folder / "configs" / "metadata.json")


def front_matter(
    metadata: Mapping[str, Any], predict: Mapping[str, Any], is_phantom: bool, is_distilled: bool = True
) -> dict[str, Any]:
    """What the hub reads at the head of a model card; scores on phantoms are no results and stay out."""
    task = "image-segmentation" if predict["kind"] == "segmentation" else "image-classification"
    modality = metadata["network_data_format"]["inputs"]["image"]["modality"]
    result: dict[str, Any] = {
        "pipeline_tag": task,
        "library_name": "monai",
        "tags": ["monai", "medical", *["knowledge-distillation"] * is_distilled, "onnx", modality],
        "license": "other",
        "license_name": "terms-of-data-and-teachers",
        "license_link": "docs/data_license.txt",
    }
    if metadata["eval_metrics"] and not is_phantom:
        scores = [{"type": name, "value": value} for name, value in metadata["eval_metrics"].items()]
        dataset = {"type": predict["task"], "name": metadata["data_source"], "split": "test"}
        results = [{"task": {"type": task}, "dataset": dataset, "metrics": scores}]
        result["model-index"] = [{"name": metadata["name"], "results": results}]
    return result


def located(where: str | Path, revision: str | None = None) -> Path:
    """Return an exported folder: a local one, or the part of a repository on the hub that prediction reads.

    A name such as ``dist/polyps`` is never looked up on the hub where there is a local folder ``dist``. No such folder,
    and what the hub does not give, are an OSError; a revision of a local folder is a ValueError.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        if revision:
            raise ValueError(f"{folder} is a folder here, which has no revision {revision}: leave out the revision.")
        return folder
    name = str(where)
    if not REPOSITORY.fullmatch(name) or folder.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give what `export` made, or OWNER/NAME of the hub.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=ANSWERING))
    except Exception as error:  # the client's own, and those of what it talks through
        raise OSError(_unreachable(name, error)) from None


def push(folder: str | Path, repository: str, public: bool = False) -> str:
    """Upload a folder of the format ``hub`` and return its address; a new repository is private unless ``public``.

    Another folder, or a name that is none of the hub's, is a ValueError; what the hub does not take is an OSError.
    """
    folder = Path(folder).expanduser()
    if missing := [name for name in (WEIGHTS, CONFIG, "README.md") if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing[0]}: make it by `export --formats hub`.")
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"'{repository}' is not a name on the hub: write OWNER/NAME.")
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Student exported by amkd_monai")
    except Exception as error:
        raise OSError(_unreachable(repository, error)) from None
    return str(address)


def _unreachable(repository: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"https://huggingface.co/{repository} cannot be reached or is closed to you ({reason}): log in by "
        "`hf auth login` or set HF_TOKEN, and check the network and HF_HUB_OFFLINE."
    )


def write_triton(folder: Path, name: str) -> None:
    """Write ``triton/`` into the folder of an export: each ONNX network as a model that takes batches.

    ``name`` is that of the float model; that of 8 bits is ``<name>_int8``.
    """
    predict, metadata = _described(folder)
    channels = metadata["network_data_format"]["inputs"]["image"]["num_channels"]
    count, patch = len(predict["classes"]), predict.get("window", {}).get("roi_size")
    size, largest = (patch, PATCHES) if patch else ([-1, -1], LARGEST_BATCH)
    answers = {"segmentation": [count, *size], "classification": [count], "multilabel": [2, count]}
    shapes = {"image": [channels, *size], "pred": answers[predict["kind"]]}
    image, pred = (f"{{ name: {json.dumps(of)} data_type: TYPE_FP32 dims: {dims} }}" for of, dims in shapes.items())
    for form, model in predict["models"].items():
        called = f"{name}_int8" if form == "ort-int8" else name
        target = folder / "triton" / called
        (target / "1").mkdir(parents=True)
        shutil.copyfile(folder / model, target / "1" / "model.onnx")
        config = f"""name: {json.dumps(called)}
backend: "onnxruntime"
max_batch_size: {largest}
input [ {image} ]
output [ {pred} ]
dynamic_batching {{ max_queue_delay_microseconds: {LONGEST_WAIT} }}
"""
        (target / "config.pbtxt").write_text(config, encoding="utf-8")
