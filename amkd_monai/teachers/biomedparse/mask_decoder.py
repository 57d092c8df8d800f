"""The mask decoder: queries that look at the image and at the words of a prompt, and give one mask each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.teachers.biomedparse.blocks import CrossAttention, FeedForward, SelfAttention, sine_positions
from amkd_monai.teachers.biomedparse.pixel_decoder import PixelFeatures
from amkd_monai.teachers.biomedparse.text import TextEncoder

LEVELS = 3


class MaskDecoder(nn.Module):
    """Masked attention (Cheng et al., CVPR 2022) with the words of a prompt as further tokens (Zou et al., SEEM, 2023).

    Args:
        text: encoder of the prompts.
        width: channels of queries, words and maps.
        heads: attention heads.
        hidden: hidden channels of the feed-forward layers.
        layers: decoder layers.
        queries: masks per prompt.
    """

    def __init__(self, text: TextEncoder, width: int, heads: int, hidden: int, layers: int, queries: int) -> None:
        super().__init__()
        self.lang_encoder = text
        self.query_feat, self.query_embed = nn.Embedding(queries, width), nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttention(width, heads) for _ in range(layers))
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttention(width, heads) for _ in range(layers))
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(width, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.mask_embed = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(width, width) for _ in range(3))})
        self.class_embed = nn.Parameter(torch.randn(width, width) * 0.02)

    def masks(self, normalised: Tensor, mask_features: Tensor) -> Tensor:
        """Return mask logits (B, Q, H, W) of normalised queries (B, Q, C) and features (B, C, H, W)."""
        first, second, third = self.mask_embed["layers"]
        return torch.einsum("bqc,bchw->bqhw", third(F.relu(second(F.relu(first(normalised))))), mask_features)

    def forward(self, image: PixelFeatures, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return query embeddings (B, Q, C) and mask logits (B, Q, H/4, W/4) for words (B, T, C)."""
        batch, size = len(words), self.query_feat.num_embeddings
        places = [sine_positions(scale, scale.shape[1]) for scale in image.scales]
        memories = [
            scale.flatten(2).transpose(1, 2) + level  # (B, C, h, w) -> (B, h * w, C)
            for scale, level in zip(image.scales, self.level_embed.weight, strict=True)
        ]
        queries = self.query_feat.weight.expand(batch, -1, -1)
        query_position = self.query_embed.weight.expand(batch, -1, -1)
        position = torch.cat([query_position, words], dim=1)  # the words' own states are their positions
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (look, exchange, feed_forward) in enumerate(layers):
            level = i % LEVELS
            masks = self.masks(self.decoder_norm(queries), image.mask_features)
            blocked = _outside(masks, image.scales[level])
            queries = look(queries, query_position, memories[level], places[level], blocked)
            tokens = feed_forward(exchange(torch.cat([queries, words], dim=1), position))
            queries, words = tokens[:, :size], tokens[:, size:]
        normalised = self.decoder_norm(queries)
        return normalised @ self.class_embed, self.masks(normalised, image.mask_features)

    def similarity(self, embeddings: Tensor, prompt: Tensor) -> Tensor:
        """Return the similarity (B, Q, P) of query embeddings (B, Q, C) to prompts (P, C)."""
        scale = self.lang_encoder.logit_scale.exp().clamp(max=100)
        return scale * (_unit(embeddings) @ _unit(prompt).T)


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-7)


def _outside(masks: Tensor, scale: Tensor) -> Tensor:
    """Return (B, Q, h * w), True outside a query's mask (B, Q, H, W); a query that sees nothing sees everything."""
    resized = F.interpolate(masks, size=scale.shape[-2:], mode="bilinear", align_corners=False)
    outside = resized.sigmoid().flatten(2) < 0.5
    return outside & ~outside.all(dim=-1, keepdim=True)
