"""What a state dict seems to be, judged by its keys and shapes: so that a wrong file is named, not just refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MEDSAM, MEDSAM_HUB = "a SAM ViT-B or MedSAM file", "a SAM ViT-B or MedSAM file in Hugging Face's layout"
RETFOUND, RETFOUND_TUNED, RETFOUND_DINO = (
    "a plain ViT (RETFound's MAE layout)",
    "a fine-tuned RETFound (MAE)",
    "RETFound's DINOv2 variant, or another DINOv2 file",
)
USFM, USFM_UPERNET = "a USFM file", "a USFM segmentation network (UPerNet)"
BIOMEDPARSE = "a BiomedParse v1 file"

SIGNATURES = {
    "LiteMedSAM (TinyViT encoder)": (r"image_encoder\.layers\.",),
    "MedSAM2 or SAM 2": (r"(image_encoder\.trunk|memory_attention|memory_encoder)\.",),
    "SAM ViT-L": (r"(image|vision)_encoder\.pos_embed .*x1024$",),
    "SAM ViT-H": (r"(image|vision)_encoder\.pos_embed .*x1280$",),
    MEDSAM: (r"image_encoder\.pos_embed ",),
    MEDSAM_HUB: (r"vision_encoder\.pos_embed ",),
    BIOMEDPARSE: (r".*sem_seg_head\.predictor\.lang_encoder\.",),
    "BiomedParse v2": (r"sem_seg_head\.",),
    USFM_UPERNET: (r"decode_head\.conv_seg\.weight ",),
    "TinyUSFM": (r"cls_token .*x192$", r"blocks\.0\.attn\.qkv\.weight "),
    USFM: (r".*relative_position_bias_table ",),
    RETFOUND_DINO: (r".*blocks\.0\.ls1\.gamma ",),
    RETFOUND_TUNED: (r"fc_norm\.weight ", r"head\.weight ", r"blocks\.0\.attn\.qkv\.weight "),
    RETFOUND: (r"cls_token ", r"pos_embed ", r"blocks\.0\.attn\.qkv\.bias "),
}
"""By what a file looks like: patterns, each of which one of its lines "name shape" matches from its start.

The first that fits wins.
"""


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Return what a state dict seems to be, or None where no signature fits."""
    lines = [f"{name} {'x'.join(map(str, value.shape))}" for name, value in state.items()]
    fits = (
        name
        for name, patterns in SIGNATURES.items()
        if all(any(re.match(pattern, line) for line in lines) for pattern in patterns)
    )
    return next(fits, None)
