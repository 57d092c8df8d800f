"""The text encoder: a causal transformer over CLIP's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 49408
CONTEXT = 77


def quick_gelu(x: Tensor) -> Tensor:
    """Return CLIP's activation; it is near GELU, but not GELU."""
    return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Attention and feed-forward of tokens (B, T, C), normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor, future: Tensor) -> Tensor:
        """Return tokens (B, T, C); ``future`` (T, T) is True where a token must not look."""
        x = self.ln_1(tokens)
        tokens = tokens + self.attn(x, x, x, attn_mask=future, need_weights=False)[0]
        return tokens + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(tokens))))


class TextTransformer(nn.Module):
    """CLIP's text transformer (Radford et al., ICML 2021)."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        """Return states (B, T, C) of token ids (B, T)."""
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        future = torch.ones((length, length), dtype=torch.bool, device=ids.device).triu(1)
        for block in self.resblocks:
            x = block(x, future)
        return self.ln_final(x)


class TextEncoder(nn.Module):
    """Token ids to the states that the mask decoder attends to."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.lang_encoder = TextTransformer(width, heads, layers)
        self.lang_proj = nn.Parameter(torch.randn(width, width) * 0.02)
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        """Return projected states (B, T, C) of ids (B, T); a prompt's last state, at its end token, stands for it."""
        return self.lang_encoder(ids) @ self.lang_proj
