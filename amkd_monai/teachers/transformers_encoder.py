"""Image encoders of Hugging Face's transformers (``AutoModel``) as teachers of features."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amkd_monai.storage import read_json
from amkd_monai.teachers.base import Teacher, TeacherFeatures, pool_to_grid
from amkd_monai.weights import CheckpointError, check_finite

OWN: dict[str, Any] = {"do_rescale": True, "do_flip_channel_order": False, "include_top": False}
OWN |= {"rescale_offset": False, "rescale_factor": 1 / 255}
"""Steps of a preprocessor_config.json as they are done here; other values would be other images."""
MOST_PREFIX_TOKENS = 16  # Class, distillation and register tokens precede the patches; encoders have up to 9 of them


class TransformersTeacher(Teacher):
    """A frozen image encoder: the last map of patches as the grid, and the encoder's pooled vector or the map's mean.

    Size, mean and standard deviation are those of the encoder's ``preprocessor_config.json`` unless given; images are
    squashed, not cropped. Code that lies beside weights is never run.

    Args:
        model: folder with ``config.json`` and weights, or a name on huggingface.co that is in the local cache.
        weights: ``own``, or ``random`` (marks the run as a test), which needs ``config.json`` alone.
        download: fetch ``model`` from huggingface.co where it is not in the cache.
    """

    settings = ("config", "image_size", "interpolation", "mean", "std", "grid_limit", "precision")

    def __init__(
        self,
        name: str,
        model: str | Path,
        weights: str = "own",
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bilinear",
        download: bool = False,
        grid_limit: int = 16,
        precision: str = "float32",
        licence: str = "unknown",
    ) -> None:
        super().__init__(name, licence, precision)
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError as error:
            raise ValueError(f"The teacher '{name}' needs transformers: run `pip install transformers`.") from error
        folder, lacks = local_folder(model, download), []
        self.is_random, self.grid_limit = self.one_of("weights", weights, ("own", "random")) == "random", grid_limit
        try:
            if self.is_random or torch.get_default_device().type == "meta":  # there, shapes alone are wanted
                self.network = AutoModel.from_config(AutoConfig.from_pretrained(folder))
            else:
                self.network, report = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
                lacks = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{folder} holds no encoder that transformers can load ({reason}).") from error
        kind, config = type(self.network).__name__, self.network.config
        if self.network.main_input_name != "pixel_values" or hasattr(self.network, "decoder"):
            raise ValueError(f"{folder} holds {kind}, not an image encoder: give another `model` for '{name}'.")
        self.has_pooler = not any(key.startswith("pooler.") for key in lacks)  # else transformers leaves it random
        if lacks := [key for key in lacks if not key.startswith("pooler.")]:
            raise CheckpointError(f"{folder} lacks {len(lacks)} tensors of {kind} (first: {lacks[0]}): get it again.")
        if not self.is_random:
            check_finite(self.network.state_dict(), folder)
            self.came_from(min([*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]))
            self.read_from += folder.absolute().glob("*.json")
        self.config = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
        stated = read_json(folder / "preprocessor_config.json")
        if other := {key: stated[key] for key, own in OWN.items() if (stated.get(key, own) or False) != own}:
            raise ValueError(f"preprocessor_config.json in {folder} asks for {other}: give '{name}' another `model`.")
        stated |= {} if stated.get("do_normalize", True) else {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        crop = stated.get("crop_size") if stated.get("do_center_crop", True) else None
        size = crop or stated.get("size") or getattr(config, "image_size", None)
        if isinstance(size, dict):
            size = [size["height"], size["width"]] if "height" in size else size.get("shortest_edge")
        mean, std = mean or stated.get("image_mean"), std or stated.get("image_std")
        if mean is None or std is None:
            raise ValueError(f"preprocessor_config.json in {folder} has no image_mean or image_std: give mean and std.")
        self.set_input(image_size or size, mean, std, interpolation)
        if self.image_size is not None:
            with torch.device("meta"):  # shapes alone, at no cost
                sides = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
                try:
                    self.look(AutoModel.from_config(config).eval(), torch.zeros(1, 3, *sides))
                except (RuntimeError, ValueError) as error:
                    why = f"of {sides} pixels ({str(error).strip().splitlines()[0]})"
                    raise ValueError(f"The teacher '{name}' cannot take images {why}: set image_size.") from error
        self.freeze()

    def look(self, network: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid (B, C, h, w) and the pooled vector (B, C') of a network's input (B, 3, H, W)."""
        resizes = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        options: dict[str, Any] = {"interpolate_pos_encoding": True} if resizes else {}
        said = network(pixel_values=pixels, output_hidden_states=True, **options)
        maps = [said.last_hidden_state, *(getattr(said, "reshaped_hidden_states", None) or said.hidden_states)[-1:]]
        grid = next((found for found in maps if found.ndim == 4), None)
        if grid is None:
            patch = network.config.patch_size
            sides = (patch, patch) if isinstance(patch, int) else patch
            height, width = (side // cell for side, cell in zip(pixels.shape[-2:], sides, strict=True))
            prefix = maps[0].shape[1] - height * width
            if not 0 <= prefix <= MOST_PREFIX_TOKENS:
                raise ValueError(f"{maps[0].shape[1]} tokens are not those of {height} x {width} patches")
            if any(side % cell for side, cell in zip(pixels.shape[-2:], sides, strict=True)):
                raise ValueError(f"a side is not a multiple of {patch}")
            grid = maps[0][:, prefix:].transpose(1, 2).unflatten(2, (height, width))  # (B, h * w, C) -> (B, C, h, w)
        pooled = getattr(said, "pooler_output", None) if self.has_pooler else None
        return grid.float(), grid.float().mean((2, 3)) if pooled is None else pooled.float().flatten(1)

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return the grid (B, C, h, w) and the pooled vector (B, C') of an image (B, 3, H, W), RGB in [0, 1]."""
        with self.autocast(image):
            grid, pooled = self.look(self.network, self.prepare(image))
        return TeacherFeatures(grid=pool_to_grid(grid, self.grid_limit), pooled=pooled)


def local_folder(model: str | Path, download: bool) -> Path:
    """Return the folder of an encoder: itself, or its snapshot in the Hugging Face cache.

    A CheckpointError if it is neither there nor in the cache.
    """
    from huggingface_hub import errors, snapshot_download

    if os.path.isdir(model):  # noqa: PTH112 - never raises
        return Path(model)
    try:
        wanted = ["*.json", "*.safetensors"]
        return Path(snapshot_download(str(model), local_files_only=not download, allow_patterns=wanted))
    except (errors.HFValidationError, OSError) as error:
        remedy = "give the folder of `model`, or set `download` to true for a name on huggingface.co"
        raise CheckpointError(f"There is no folder {model}, nor a snapshot in the cache: {remedy}.") from error
