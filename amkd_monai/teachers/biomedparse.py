"""BiomedParse v1 as a teacher, and its network, put together under the names of its official checkpoint.

Zhao et al., A foundation model for joint segmentation, detection and recognition of biomedical objects across nine
modalities, Nature Methods 2025. Image encoder: timm's FocalNet. Pixel decoder: a transformer on the coarsest map, then
a feature pyramid (Zou et al., X-Decoder, CVPR 2023). Mask decoder: queries that attend to the image and to the words of
a prompt, and give one mask each (Cheng et al., Mask2Former, CVPR 2022; Zou et al., SEEM, NeurIPS 2023). Text encoder:
CLIP's (Radford et al., ICML 2021). All attention blocks of the decoders normalise after the residual sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import quick_gelu
from timm.models.focalnet import FocalNet
from torch import Tensor, nn

from amkd_monai.teachers.base import TeacherFeatures, binary_to_two_class, fixed_initialisation, pool_to_grid
from amkd_monai.teachers.official import OfficialTeacher, read_official
from amkd_monai.weights import CheckpointError

VOCABULARY, CONTEXT = 49408, 77
LEVELS = 3  # maps of the pixel decoder that the queries of the mask decoder attend to in turn

LINEAR = re.compile(r"\.(modulation\.f|modulation\.proj|mlp\.fc1|mlp\.fc2)\.weight$")
"""Linear layers of the official network that timm computes as 1x1 convolutions."""

_PREDICTOR = "sem_seg_head.predictor."
UNUSED = (
    f"{_PREDICTOR}lang_encoder.biomed_encoder.",  # a BiomedBERT that was tried and left out of the forward path
    f"{_PREDICTOR}mask_sptial_embed.",  # prompts by strokes, here and in the next three
    f"{_PREDICTOR}pn_indicator.",
    f"{_PREDICTOR}spatial_embed.",
    f"{_PREDICTOR}spatial_featured.",
    "dilation_kernel",  # training only, here and in the next
    "criterion.empty_weight",
)
"""Prefixes of the official checkpoint's keys that a text-prompted mask does not depend on."""


@dataclass(frozen=True)
class Sizes:
    """Depths and widths; the defaults are those of the official checkpoint."""

    backbone: int = 192  # channels of the first stage; each further stage has twice as many
    depths: Sequence[int] = (2, 2, 18, 2)  # blocks of the backbone's stages
    width: int = 512  # channels of everything after the backbone; a multiple of 32
    heads: int = 8
    hidden: int = 2048  # channels inside the feed-forward layers
    encoder_layers: int = 6  # of the pixel decoder
    decoder_layers: int = 9  # of the mask decoder
    queries: int = 101  # masks per prompt
    text_layers: int = 12


class FocalBackbone(nn.Module):
    """FocalNet (Yang et al., NeurIPS 2022) with a LayerNorm on each stage's map, under the official names."""

    def __init__(self, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        network = FocalNet(
            num_classes=0,
            embed_dim=width,
            depths=tuple(depths),
            focal_levels=(4, 4, 4, 4),
            use_overlap_down=True,
            use_post_norm=True,
            normalize_modulator=True,
            layerscale_value=1e-4,
            drop_path_rate=0.0,
        )
        self.patch_embed, self.layers = network.stem, network.layers
        for level in range(4):
            self.add_module(f"norm{level}", nn.LayerNorm(width * 2**level))
        self.register_state_dict_post_hook(_to_official)
        self.register_load_state_dict_pre_hook(_from_official)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps (B, C, H/4, W/4) to (B, 8 C, H/32, W/32) of pixels (B, 3, H, W); H, W multiples of 32."""
        maps, x = [], self.patch_embed(pixels)
        for level, layer in enumerate(self.layers):
            x = layer(x)
            normalised = self.get_submodule(f"norm{level}")(x.permute(0, 2, 3, 1))
            maps.append(normalised.permute(0, 3, 1, 2).contiguous())  # (B, h, w, C) -> (B, C, h, w)
        return maps


def official_name(name: str) -> str:
    """Return what the official checkpoint calls a parameter of :class:`FocalBackbone`."""
    name = re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    return re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", re.sub(r"\.norm([12])_post\.", r".norm\1.", name))


def _to_official(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {name: state.pop(prefix + name) for name, _ in module.named_parameters()}
    for name, value in own.items():
        state[prefix + official_name(name)] = value.flatten(1) if LINEAR.search(name) else value


def _from_official(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {name: state.pop(prefix + official_name(name), None) for name, _ in module.named_parameters()}
    for name, value in own.items():
        if value is not None:
            state[prefix + name] = value[..., None, None] if LINEAR.search(name) else value


def _attended(
    layers: Iterable[nn.Module], tokens: Tensor, position: Tensor, keys: Tensor, values: Tensor, blocked: Any = None
) -> Tensor:
    """Attention and norm of tokens (B, Q, C) over values (B, N, C); ``blocked`` (B * heads, Q, N) hides values."""
    attention, norm = layers
    return norm(tokens + attention(tokens + position, keys, values, attn_mask=blocked, need_weights=False)[0])


def _fed_forward(layers: Iterable[nn.Module], tokens: Tensor) -> Tensor:
    """Two linear layers and norm on tokens (B, N, C)."""
    first, second, norm = layers
    return norm(tokens + second(F.relu(first(tokens))))


def sine_positions(grid: Tensor, channels: int) -> Tensor:
    """Return the sine code (Carion et al., DETR, 2020) of a map's cells (B, *, h, w) as tokens (1, h * w, channels)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=grid.device).div(2, rounding_mode="floor") * 2 / half
    period = 10000**exponent

    def code(cells: int) -> Tensor:  # (cells, half): sine and cosine alternate
        place = torch.arange(1, cells + 1, dtype=torch.float32, device=grid.device) / (cells + 1e-6) * (2 * math.pi)
        angle = place[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    rows, columns = map(code, grid.shape[-2:])
    rows, columns = torch.broadcast_tensors(rows[:, None], columns[None])  # (h, w, half) each
    return torch.cat([rows, columns], dim=2).reshape(1, -1, channels)


@dataclass
class PixelFeatures:
    """What the mask decoder reads of an image: maps of one width C."""

    encoded: Tensor  # output of the transformer (B, C, H/32, W/32)
    scales: list[Tensor]  # (B, C, h, w) of the strides 32, 16, 8
    mask_features: Tensor  # (B, C, H/4, W/4)

    def float(self) -> PixelFeatures:
        """Return the same in float32."""
        return PixelFeatures(self.encoded.float(), [scale.float() for scale in self.scales], self.mask_features.float())


class _NormedConv(nn.Conv2d):
    """A convolution without bias, group-normalised."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """The backbone's four maps, of the given channels and strides 4 to 32, to maps of one width."""

    def __init__(self, channels: Sequence[int], sizes: Sizes) -> None:
        super().__init__()
        width, layers = sizes.width, range(sizes.encoder_layers)
        self.input_proj = nn.Conv2d(channels[-1], width, 1)
        encoder = (nn.TransformerEncoderLayer(width, sizes.heads, sizes.hidden, 0.0, batch_first=True) for _ in layers)
        self.transformer = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList(encoder)})})
        self.adapter_1, self.adapter_2, self.adapter_3 = (_NormedConv(c, width, 1) for c in channels[:3])
        self.layer_1, self.layer_2, self.layer_3, self.layer_4 = (_NormedConv(width, width, 3) for _ in range(4))
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> PixelFeatures:
        """Decode the backbone's maps (B, C_i, h_i, w_i), finest first."""
        x = self.input_proj(maps[-1])
        tokens, places = x.flatten(2).transpose(1, 2), sine_positions(x, x.shape[1])  # (B, C, h, w) -> (B, h * w, C)
        for layer in self.transformer["encoder"]["layers"]:
            tokens = _attended((layer.self_attn, layer.norm1), tokens, places, tokens + places, tokens)
            tokens = _fed_forward((layer.linear1, layer.linear2, layer.norm2), tokens)
        encoded = tokens.transpose(1, 2).reshape(x.shape)
        scales = [F.relu(self.layer_4(encoded))]
        finer = ((self.adapter_3, self.layer_3), (self.adapter_2, self.layer_2), (self.adapter_1, self.layer_1))
        for grid, (adapter, layer) in zip(maps[-2::-1], finer, strict=True):
            above = F.interpolate(scales[-1], size=grid.shape[-2:], mode="nearest")
            scales.append(F.relu(layer(adapter(grid) + above)))
        return PixelFeatures(encoded, scales[:LEVELS], self.mask_features(scales[-1]))


class _TextBlock(nn.Module):
    """Attention and feed-forward of tokens (B, T, C), normalised before each; ``future`` (T, T) blocks later tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor, future: Tensor) -> Tensor:
        x = self.ln_1(tokens)
        tokens = tokens + self.attn(x, x, x, attn_mask=future, need_weights=False)[0]
        return tokens + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(tokens))))  # near GELU, not GELU


class _TextTransformer(nn.Module):
    """CLIP's causal text transformer: ids (B, T) to states (B, T, C)."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.resblocks = nn.ModuleList(_TextBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        future = torch.ones((ids.shape[1],) * 2, dtype=torch.bool, device=ids.device).triu(1)
        for block in self.resblocks:
            x = block(x, future)
        return self.ln_final(x)


class TextEncoder(nn.Module):
    """Token ids to the states that the mask decoder attends to."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.lang_encoder = _TextTransformer(width, heads, layers)
        self.lang_proj = nn.Parameter(torch.randn(width, width) * 0.02)
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        """Return projected states (B, T, C) of ids (B, T); a prompt's last state, at its end token, stands for it."""
        return self.lang_encoder(ids) @ self.lang_proj


class MaskDecoder(nn.Module):
    """Masked attention of queries to the image, and of queries and words to each other."""

    def __init__(self, text: TextEncoder, sizes: Sizes) -> None:
        super().__init__()
        width, heads, hidden, layers = sizes.width, sizes.heads, sizes.hidden, range(sizes.decoder_layers)
        self.lang_encoder, self.heads = text, heads
        self.query_feat, self.query_embed = (nn.Embedding(sizes.queries, width) for _ in range(2))
        self.level_embed = nn.Embedding(LEVELS, width)

        def attention_layers(name: str) -> nn.ModuleList:
            pairs = ((nn.MultiheadAttention(width, heads, batch_first=True), nn.LayerNorm(width)) for _ in layers)
            return nn.ModuleList(nn.ModuleDict({name: attention, "norm": norm}) for attention, norm in pairs)

        self.transformer_cross_attention_layers = attention_layers("multihead_attn")
        self.transformer_self_attention_layers = attention_layers("self_attn")
        parts = ((nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)) for _ in layers)
        self.transformer_ffn_layers = nn.ModuleList(
            nn.ModuleDict({"linear1": first, "linear2": second, "norm": norm}) for first, second, norm in parts
        )
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
        queries, query_position = (e.weight.expand(batch, -1, -1) for e in (self.query_feat, self.query_embed))
        position = torch.cat([query_position, words], dim=1)  # the words' own states are their positions
        for i, cross_attention in enumerate(self.transformer_cross_attention_layers):
            self_attention, feed_forward = self.transformer_self_attention_layers[i], self.transformer_ffn_layers[i]
            memory, place = memories[i % LEVELS], places[i % LEVELS]
            masks = self.masks(self.decoder_norm(queries), image.mask_features)
            blocked = _outside(masks, image.scales[i % LEVELS]).repeat_interleave(self.heads, 0)  # (B * heads, Q, N)
            queries = _attended(cross_attention.values(), queries, query_position, memory + place, memory, blocked)
            tokens = torch.cat([queries, words], dim=1)
            tokens = _attended(self_attention.values(), tokens, position, tokens + position, tokens)
            tokens = _fed_forward(feed_forward.values(), tokens)
            queries, words = tokens[:, :size], tokens[:, size:]
        normalised = self.decoder_norm(queries)
        return normalised @ self.class_embed, self.masks(normalised, image.mask_features)

    def similarity(self, embeddings: Tensor, prompt: Tensor) -> Tensor:
        """Return the similarity (B, Q, P) of query embeddings (B, Q, C) to prompts (P, C)."""
        embeddings, prompt = (x / (x.norm(dim=-1, keepdim=True) + 1e-7) for x in (embeddings, prompt))
        return self.lang_encoder.logit_scale.exp().clamp(max=100) * (embeddings @ prompt.T)


def _outside(masks: Tensor, scale: Tensor) -> Tensor:
    """Return (B, Q, h * w), True outside a query's mask (B, Q, H, W); a query whose mask is empty sees everything."""
    resized = F.interpolate(masks, size=scale.shape[-2:], mode="bilinear", align_corners=False)
    outside = resized.sigmoid().flatten(2) < 0.5
    return outside & ~outside.all(dim=-1, keepdim=True)


def _full_precision(x: Tensor) -> torch.autocast:
    """Return the context that switches autocast off on the device of ``x``."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class BiomedParse(nn.Module):
    """BiomedParse v1: an image is encoded once, then decoded for one prompt after the other.

    Under autocast only the pixel decoder works in half precision. In the backbone rounding errors grow from block to
    block, and in the mask decoder a mask logit that is rounded across 0 changes what a query sees.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = [sizes.backbone * 2**level for level in range(4)]
        text = TextEncoder(sizes.width, sizes.heads, sizes.text_layers)
        pixel_decoder, predictor = PixelDecoder(channels, sizes), MaskDecoder(text, sizes)
        self.backbone = FocalBackbone(sizes.backbone, sizes.depths)
        self.sem_seg_head = nn.ModuleDict({"pixel_decoder": pixel_decoder, "predictor": predictor})

    def look(self, pixels: Tensor) -> tuple[list[Tensor], PixelFeatures]:
        """Return the backbone's four maps and the decoder's features of normalised pixels (B, 3, H, W)."""
        with _full_precision(pixels):
            maps = self.backbone(pixels)
        return maps, self.sem_seg_head["pixel_decoder"](maps)

    def read(self, ids: Tensor) -> Tensor:
        """Return the states (1, T, C) of one prompt's token ids (T,)."""
        with _full_precision(ids):
            return self.sem_seg_head["predictor"].lang_encoder(ids[None])

    def segment(self, image: PixelFeatures, words: Tensor) -> Tensor:
        """Return the mask logits (B, 1, H/4, W/4) of one prompt's states (1, T, C): those of the best query."""
        predictor = self.sem_seg_head["predictor"]
        with _full_precision(words):
            embeddings, masks = predictor(image.float(), words.expand(len(image.mask_features), -1, -1))
            best = predictor.similarity(embeddings, words[:, -1]).argmax(dim=1)[:, 0]  # (B, Q, 1) -> (B,)
        return masks[torch.arange(len(masks), device=masks.device), best][:, None]


STRIDES = (4, 8, 16, 32)
START, END = VOCABULARY - 2, VOCABULARY - 1


class BiomedParseTeacher(OfficialTeacher):
    """BiomedParse v1 (Zhao et al., Nature Methods 2025), prompted once for each foreground class.

    Prompts are decoded one by one, since prompts in one pass change each other's masks.

    Args:
        prompts: one text per foreground class, in the order of the task's classes; needs ``open_clip_torch``. An empty
            list gives features alone.
        token_ids: CLIP's ids of the prompts instead, each from 49406 to 49407.
        image_size: a multiple of 32; 1024 is what the network was trained for.
        stride: stride of the feature map wanted: 4, 8, 16 or 32.
        sizes: depths and widths other than the official ones (:class:`Sizes`), for tests.
        precision: of the pixel decoder.
    """

    settings = (*OfficialTeacher.settings, "token_ids", "stride")

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        prompts: Sequence[str] | None = None,
        token_ids: Sequence[Sequence[int]] | None = None,
        image_size: int = 1024,
        stride: int = 32,
        grid_limit: int = 16,
        sizes: Mapping[str, Any] | None = None,
        precision: str = "float32",
        licence: str = "research use only; see its card",
    ) -> None:
        super().__init__(name, licence, precision)
        self.image_size, self.stride, self.grid_limit = image_size, self.one_of("stride", stride, STRIDES), grid_limit
        self.patches(STRIDES[-1])
        if isinstance(prompts, str) or (prompts is None) == (token_ids is None):
            raise ValueError(f"The teacher '{name}' needs `prompts` or `token_ids`: a list, one per foreground class.")
        words = tokenised(prompts) if prompts else token_ids or ()
        self.token_ids = [_checked(ids, number) for number, ids in enumerate(words, 1)]
        official = read_official("biomedparse", weights)
        if any(".language_encoder." in key for key in official.state):
            other = "BiomedParse v2, another network, for slices of volumes, whose layout is not known here"
            raise CheckpointError(f"{official.path} holds {other}: give biomedparse_v1.pt.")
        with fixed_initialisation(replaced=bool(official.state)):
            self.network = BiomedParse(Sizes(**(sizes or {})))
        self.fill(official, UNUSED)

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return grid (B, C, h, w), pooled vector (B, C') and logits (B, 1 + prompts, S/4, S/4) of (B, 3, H, W).

        Without prompts there are no logits.
        """
        prompts = [self.network.read(torch.tensor(ids, device=image.device)) for ids in self.token_ids]
        grids, pooled, logits = [], [], []
        for pixels in self.prepare(image).split(1):  # one image at a time: each takes about 2 GB at 1024 pixels
            with self.autocast(image):
                maps, features = self.network.look(pixels)
            grids.append(pool_to_grid(maps[STRIDES.index(self.stride)], self.grid_limit))
            pooled.append(maps[-1].mean((2, 3)))
            if prompts:
                masks = torch.cat([self.network.segment(features, words) for words in prompts], dim=1)
                logits.append(torch.cat([binary_to_two_class(masks[:, :1]), masks[:, 1:]], dim=1))
        return TeacherFeatures(torch.cat(grids), torch.cat(pooled), torch.cat(logits) if logits else None)


def tokenised(prompts: Sequence[str]) -> list[list[int]]:
    """Return CLIP's token ids of prompts, from the start to the end token; nothing is downloaded.

    A ValueError without open_clip.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ValueError("`prompts` need `pip install open_clip_torch`: run it, or give `token_ids`.") from error
    words = SimpleTokenizer()
    return [[START, *words.encode(prompt), END] for prompt in prompts]


def _checked(ids: Sequence[int], number: int) -> list[int]:
    """Return a prompt's ids up to the first end token; the padding after it has no effect."""
    kept = list(ids[: ids.index(END) + 1]) if isinstance(ids, Sequence) and END in ids else []
    if not 3 <= len(kept) <= CONTEXT or kept[0] != START or not all(0 <= i < START for i in kept[1:-1]):
        wanted = f"{START}, then 1 to {CONTEXT - 2} ids of word pieces below {START}, then {END}"
        raise ValueError(f"The prompt {number} has other token ids than CLIP's: give {wanted}.")
    return kept
