"""The whole network, put together under the names of the official checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amkd_monai.teachers.biomedparse.backbone import FocalBackbone
from amkd_monai.teachers.biomedparse.mask_decoder import MaskDecoder
from amkd_monai.teachers.biomedparse.pixel_decoder import PixelDecoder, PixelFeatures
from amkd_monai.teachers.biomedparse.text import TextEncoder


@dataclass(frozen=True)
class Sizes:
    """Depths and widths; the defaults are those of the official checkpoint.

    Attributes:
        backbone: channels of the backbone's first stage.
        depths: blocks of the backbone's four stages.
        width: channels of everything after the backbone; a multiple of 32.
        heads: attention heads.
        hidden: hidden channels of the feed-forward layers.
        encoder_layers: transformer layers of the pixel decoder.
        decoder_layers: layers of the mask decoder.
        queries: masks per prompt.
        text_layers: layers of the text encoder.
    """

    backbone: int = 192
    depths: Sequence[int] = (2, 2, 18, 2)
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 9
    queries: int = 101
    text_layers: int = 12


class BiomedParse(nn.Module):
    """BiomedParse v1: what an image shows is computed once, then decoded for one prompt after the other.

    Under autocast only the pixel decoder works in half precision. In the backbone rounding errors grow from block to
    block, and in the mask decoder a mask logit that is rounded across 0 changes what a query sees.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = [sizes.backbone * 2**level for level in range(4)]
        text = TextEncoder(sizes.width, sizes.heads, sizes.text_layers)
        pixel_decoder = PixelDecoder(channels, sizes.width, sizes.heads, sizes.hidden, sizes.encoder_layers)
        predictor = MaskDecoder(text, sizes.width, sizes.heads, sizes.hidden, sizes.decoder_layers, sizes.queries)
        self.backbone = FocalBackbone(sizes.backbone, sizes.depths)
        self.sem_seg_head = nn.ModuleDict({"pixel_decoder": pixel_decoder, "predictor": predictor})

    def look(self, pixels: Tensor) -> tuple[list[Tensor], PixelFeatures]:
        """Return the backbone's four maps and the decoder's features of normalised pixels (B, 3, H, W)."""
        with torch.autocast(pixels.device.type, enabled=False):
            maps = self.backbone(pixels)
        return maps, self.sem_seg_head["pixel_decoder"](maps)

    def read(self, ids: Tensor) -> Tensor:
        """Return the states (1, T, C) of one prompt's token ids (T,)."""
        with torch.autocast(ids.device.type, enabled=False):
            return self.sem_seg_head["predictor"].lang_encoder(ids[None])

    def segment(self, image: PixelFeatures, words: Tensor) -> Tensor:
        """Return the mask logits (B, 1, H/4, W/4) of one prompt's states (1, T, C): those of the best query."""
        predictor = self.sem_seg_head["predictor"]
        with torch.autocast(words.device.type, enabled=False):
            embeddings, masks = predictor(image.float(), words.expand(len(image.mask_features), -1, -1))
            best = predictor.similarity(embeddings, words[:, -1]).argmax(dim=1)[:, 0]  # (B, Q, 1) -> (B,)
        return masks[torch.arange(len(masks), device=masks.device), best][:, None]
