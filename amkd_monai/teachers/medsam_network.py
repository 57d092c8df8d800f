"""SAM's image encoder, prompt encoder and mask decoder, from the segment-anything package."""

from __future__ import annotations

from functools import partial

from torch import nn

PATCH = 16


def build_sam(
    image_size: int, embed_dim: int, depth: int, num_heads: int, global_blocks: tuple[int, ...], prompt_dim: int
) -> nn.ModuleDict:
    """Return SAM's three parts, from the segment-anything package, without weights.

    Raises:
        ValueError: segment-anything is not installed.
    """
    try:
        from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
    except ImportError as error:
        raise ValueError("MedSAM needs the package segment-anything: run `pip install segment-anything`.") from error
    side = image_size // PATCH
    return nn.ModuleDict(
        {
            "image_encoder": ImageEncoderViT(
                img_size=image_size,
                patch_size=PATCH,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
                out_chans=prompt_dim,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=14,
                global_attn_indexes=global_blocks,
            ),
            "prompt_encoder": PromptEncoder(prompt_dim, (side, side), (image_size, image_size), mask_in_chans=16),
            "mask_decoder": MaskDecoder(
                transformer_dim=prompt_dim,
                transformer=TwoWayTransformer(depth=2, embedding_dim=prompt_dim, mlp_dim=2048, num_heads=8),
            ),
        }
    )
