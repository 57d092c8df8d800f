"""What a state dict seems to be, judged by its keys and shapes: so that a wrong file is named, not just refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from amkd_monai.weights import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

MEDSAM, MEDSAM_HUB = "a SAM ViT-B or MedSAM file", "a SAM ViT-B or MedSAM file in Hugging Face's layout"
RETFOUND, RETFOUND_TUNED, RETFOUND_DINO = (
    "a plain ViT (RETFound's MAE layout)",
    "a fine-tuned RETFound (MAE)",
    "RETFound's DINOv2 variant, or another DINOv2 file",
)
USFM, USFM_UPERNET = "a USFM file", "a USFM segmentation network (UPerNet)"
BIOMEDPARSE = "a BiomedParse v1 file"


@dataclass(frozen=True)
class Signature:
    """One kind of weight file.

    Attributes:
        name: what it is, as the object of "looks like ...".
        matches: whether keys and shapes fit it; the first signature that fits wins.
    """

    name: str
    matches: Callable[[Shapes], bool]


def _prefix(*prefixes: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(key.startswith(prefixes) for key in shapes)


def _part(part: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(part in key for key in shapes)


def _has(*keys: str) -> Callable[[Shapes], bool]:
    return lambda shapes: all(key in shapes for key in keys)


def _sam_width(width: int) -> Callable[[Shapes], bool]:
    keys = ("image_encoder.pos_embed", "vision_encoder.pos_embed")
    return lambda shapes: any((shapes.get(key) or (0,))[-1] == width for key in keys)


def _suffix(suffix: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(key.endswith(suffix) for key in shapes)


def _tiny_usfm(shapes: Shapes) -> bool:
    return (shapes.get("cls_token") or (0,))[-1] == 192 and "blocks.0.attn.qkv.weight" in shapes


SIGNATURES = (
    Signature("LiteMedSAM (TinyViT encoder)", _prefix("image_encoder.layers.")),
    Signature("MedSAM2 or SAM 2", _prefix("image_encoder.trunk.", "memory_attention.", "memory_encoder.")),
    Signature("SAM ViT-L", _sam_width(1024)),
    Signature("SAM ViT-H", _sam_width(1280)),
    Signature(MEDSAM, _has("image_encoder.pos_embed")),
    Signature(MEDSAM_HUB, _has("vision_encoder.pos_embed")),
    Signature(BIOMEDPARSE, _part("sem_seg_head.predictor.lang_encoder.")),
    Signature("BiomedParse v2", _prefix("sem_seg_head.")),
    Signature(USFM_UPERNET, _has("decode_head.conv_seg.weight")),
    Signature("TinyUSFM", _tiny_usfm),
    Signature(USFM, _suffix("relative_position_bias_table")),
    Signature(RETFOUND_DINO, _suffix("blocks.0.ls1.gamma")),
    Signature(RETFOUND_TUNED, _has("fc_norm.weight", "head.weight", "blocks.0.attn.qkv.weight")),
    Signature(RETFOUND, _has("cls_token", "pos_embed", "blocks.0.attn.qkv.bias")),
)


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Return what a state dict seems to be, or None where no signature fits."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    return next((signature.name for signature in SIGNATURES if signature.matches(shapes)), None)


def refuse_other(state: Mapping[str, Tensor], source: str | Path, wanted: str, accepted: Collection[str]) -> None:
    """Refuse a file that is recognised as something else; one that nothing recognises is left to the key check.

    Args:
        state: flat state dict.
        source: named in the error message.
        wanted: what is needed, with how to say otherwise.
        accepted: names of the signatures that will do.

    Raises:
        CheckpointError: the file is something else.
    """
    found = recognise(state)
    if found is not None and found not in accepted:
        raise CheckpointError(f"{source} looks like {found}, but {wanted} is needed: give that file.")
