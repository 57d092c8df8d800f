"""Attention blocks shared by the pixel decoder and the mask decoder; all normalise after the residual sum."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Two linear layers with ReLU on tokens (B, N, C)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (B, N, C)."""
        return self.norm(tokens + self.linear2(F.relu(self.linear1(tokens))))


class SelfAttention(nn.Module):
    """Self-attention of tokens (B, N, C); positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Return tokens (B, N, C)."""
        placed = tokens + position
        return self.norm(tokens + self.self_attn(placed, placed, tokens, need_weights=False)[0])


class CrossAttention(nn.Module):
    """Attention of queries (B, Q, C) to a memory (B, N, C), both with positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, position: Tensor, memory: Tensor, places: Tensor, blocked: Tensor) -> Tensor:
        """Return queries (B, Q, C); ``blocked`` (B, Q, N) is True where a query must not look."""
        mask = blocked.repeat_interleave(self.multihead_attn.num_heads, dim=0)  # (B, Q, N) -> (B * heads, Q, N)
        answer = self.multihead_attn(queries + position, memory + places, memory, attn_mask=mask, need_weights=False)
        return self.norm(queries + answer[0])


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward of tokens (B, N, C), under the names of torch's own encoder layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Return tokens (B, N, C)."""
        placed = tokens + position
        tokens = self.norm1(tokens + self.self_attn(placed, placed, tokens, need_weights=False)[0])
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


def sine_positions(grid: Tensor, channels: int) -> Tensor:
    """Return the sine code of the cells of a map (B, *, h, w) as tokens (1, h * w, channels): rows, then columns.

    Source: Carion et al., End-to-End Object Detection with Transformers (ECCV 2020), with coordinates from 0 to 2 pi.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=grid.device).div(2, rounding_mode="floor") * 2 / half
    period = 10000**exponent

    def code(cells: int) -> Tensor:  # (cells, half): sine and cosine alternate
        place = torch.arange(1, cells + 1, dtype=torch.float32, device=grid.device) / (cells + 1e-6) * (2 * math.pi)
        angle = place[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    height, width = grid.shape[-2:]
    rows = code(height)[:, None].expand(-1, width, -1)
    columns = code(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(1, height * width, channels)
