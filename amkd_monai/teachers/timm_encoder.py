"""Encoders as teachers of features: any timm network, and the encoder of a student of this project."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amkd_monai.networks import student
from amkd_monai.teachers.base import Teacher, TeacherFeatures, pool_to_grid, resize
from amkd_monai.weights import PACKAGED, CheckpointError, load_state_dict, load_strict, packaged_file

OPENMMLAB_SAM = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"\.ln(\d)\.", r".norm\1."),
    (r"^channel_reduction\.", "neck."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
"""OpenMMLab's names of the tensors of SAM's image encoder and timm's; UltraSam's file has them under ``backbone.``."""


class TimmTeacher(Teacher):
    """A frozen timm encoder: the feature map of one stage and the pooled vector before the classifier.

    Class and register tokens are no cells of the map. Table of positions: a file's decides the input size unless
    ``image_size`` is given, to which it is then resized.

    Args:
        model: timm name, for example ``tf_efficientnet_lite2`` or ``vit_base_patch16_224``.
        weights: ``packaged``, a checkpoint file with timm's keys or in a layout that timm converts, or ``random``
            (marks the run as a test).
        image_size: None takes the network's fixed size if it has one, else the images as they come.
        mean: None takes timm's for ``model``, like ``std``.
        global_pool: how the last tokens become the pooled vector: ``avg``, ``max``, ``token``; None as timm does.
        model_args: further arguments of ``timm.create_model``.
        stride: stride of the feature map wanted (the nearest stage at or below it is taken).
    """

    settings = ("model", "model_args", "image_size", "resize", "mean", "std", "stage", "global_pool", "grid_limit")

    def __init__(
        self,
        name: str,
        model: str,
        weights: str | Path = "packaged",
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bilinear",
        global_pool: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        stride: int = 16,
        grid_limit: int = 16,
        precision: str = "float32",
        licence: str | None = None,
    ) -> None:
        super().__init__(name, licence or (PACKAGED[model].licence if model in PACKAGED else "unknown"), precision)
        self.network = student.create_encoder(model, num_classes=0, **(model_args or {}))
        self.is_random = str(weights) == "random"
        if str(weights) in ("packaged", "random"):
            student.load_encoder_weights(self.network, model, weights)
        else:
            state = in_timms_layout(self.network, load_state_dict(weights), weights)
            load_strict(self.network, state, weights, allow_unexpected=student.CLASSIFIER_PREFIXES)
        if not self.is_random:
            self.came_from(packaged_file(model) if str(weights) == "packaged" else weights)
        config = self.network.pretrained_cfg
        self.set_input(image_size, mean or config["mean"], std or config["std"], interpolation)
        if config.get("fixed_input_size"):
            self.image_size = set_network_size(self.network, self.image_size, name)
        if global_pool is not None:
            try:
                self.network.reset_classifier(0, global_pool if global_pool in ("avg", "max", "token") else "?")
            except AssertionError as error:
                known = "avg, max or, with a class token, token"
                raise ValueError(f"The teacher '{name}' has global_pool '{global_pool}': use {known}.") from error
        self.model, self.model_args, self.global_pool = model, dict(model_args or {}), global_pool
        self.resize, self.grid_limit = f"{interpolation}, anti-aliased, squashed", grid_limit
        reductions = [stage["reduction"] for stage in self.network.feature_info]
        self.stage = max((i for i, r in enumerate(reductions) if r <= stride), default=0)
        self.freeze()

    def preprocessing(self) -> dict[str, Any]:
        """Return the settings, and the precision where it is not float32."""
        return super().preprocessing() | ({} if self.precision == "float32" else {"precision": self.precision})

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return the grid (B, C, h, w) and the pooled vector (B, C') of an image (B, 3, H, W), RGB in [0, 1]."""
        with self.autocast(image):
            pixels, stages = self.prepare(image), [self.stage]
            final, maps = self.network.forward_intermediates(pixels, indices=stages, output_fmt="NCHW")
            pooled = self.network.forward_head(final, pre_logits=True)
        return TeacherFeatures(grid=pool_to_grid(maps[0].float(), self.grid_limit), pooled=pooled.float())


def in_timms_layout(network: nn.Module, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Return a file's tensors under timm's names, and set the network's input size to that of its square positions."""
    if "backbone.channel_reduction.0.weight" in state:
        state = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
        for pattern, replacement in OPENMMLAB_SAM:
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    positions, expected = state.get("pos_embed"), network.state_dict()
    if positions is not None and positions.ndim == 3 and hasattr(network, "set_input_size"):
        side = math.isqrt(positions.shape[1])
        if side == 0 or positions.shape[1] - side**2 > network.num_prefix_tokens:
            found = "x".join(map(str, positions.shape))
            raise CheckpointError(f"{source} holds 'pos_embed' as {found}, not for n x n patches: give another file.")
        network.set_input_size(img_size=tuple(side * patch for patch in network.patch_embed.patch_size))
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    patch = state.get("patch_embed.proj.weight")
    if convert is None or expected.keys() <= state.keys():
        return state
    if patch is not None and patch.shape != expected.get("patch_embed.proj.weight", patch).shape:
        return state  # timm would resize it in silence; a strict load names it
    try:
        return convert(dict(state), network)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return state  # of another network, as a strict load says


def set_network_size(network: nn.Module, size: int | tuple[int, int] | None, name: str) -> int | tuple[int, int]:
    """Resize the table of positions of a network of fixed input size, and return that size; None keeps it."""
    embed = getattr(network, "patch_embed", network)
    own = tuple(getattr(embed, "img_size", None) or network.pretrained_cfg["input_size"][-2:])
    wanted = (size, size) if isinstance(size, int) else size or own
    patch = getattr(embed, "patch_size", (1, 1))
    holder = network if hasattr(network, "set_input_size") else embed
    fits = all(side % p == 0 for side, p in zip(wanted, patch, strict=True))
    if not fits or (wanted != own and not hasattr(holder, "set_input_size")):
        known = f"multiples of {patch[0]}" if patch[0] > 1 else f"{own[0]}, the only one of its network"
        raise ValueError(f"The teacher '{name}' has image_size {size or own}: use {known}.")
    if wanted != own:
        holder.set_input_size(img_size=wanted)
    return wanted[0] if wanted[0] == wanted[1] else wanted


class StudentTeacher(Teacher):
    """The encoder of a student of this project, shared or of one task; it gives features, no answers of its own.

    ``weights`` is its flat state dict, ``model`` the timm name of its encoder, ``task`` whose batch norms are taken of
    a shared student (None: the first task's).
    """

    settings = ("model", "image_size", "grid_limit")

    def __init__(
        self,
        name: str,
        weights: str | Path,
        model: str = "tf_efficientnet_lite0",
        task: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        grid_limit: int = 16,
        licence: str = "unknown",
    ) -> None:
        super().__init__(name, licence)
        state = load_state_dict(weights)
        if heads := student.heads_of(state):
            state = student.state_of_task(state, task or next(iter(heads)))
        self.network = student.EncodedStudent(student.feature_encoder(model, range(1, 5), 0.0))
        load_strict(self.network, state, weights, allow_unexpected=("neck.", "head.", "temperature", "offsets"))
        self.came_from(weights)
        self.model, self.image_size, self.grid_limit = model, image_size, grid_limit
        self.freeze()

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return the map at stride 16 (B, C, h, w) and the pooled last map (B, C') of an image (B, 3, H, W)."""
        levels = self.network.features(resize(image, self.image_size))
        return TeacherFeatures(grid=pool_to_grid(levels[16], self.grid_limit), pooled=levels[32].mean((2, 3)))
