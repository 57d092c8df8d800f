"""BiomedParse v1 as a teacher: features of the image, and a mask for each prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amkd_monai.teachers.base import TeacherFeatures, binary_to_two_class, fixed_initialisation, pool_to_grid
from amkd_monai.teachers.biomedparse_network import CONTEXT, UNUSED, VOCABULARY, BiomedParse, Sizes
from amkd_monai.teachers.official import COMMON, OfficialTeacher, read_official
from amkd_monai.weights import CheckpointError

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

    settings = (*COMMON, "token_ids", "stride")

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
        self.image_size, self.stride, self.grid_limit = image_size, stride, grid_limit
        self.patches(STRIDES[-1])
        if stride not in STRIDES:
            raise ValueError(f"The teacher '{name}' has no map of stride {stride}: use one of {STRIDES}.")
        if isinstance(prompts, str) or (prompts is None) == (token_ids is None):
            raise ValueError(f"The teacher '{name}' needs `prompts` or `token_ids`: a list, one per foreground class.")
        words = tokenised(prompts) if prompts else token_ids or ()
        self.token_ids = [_checked(ids, number) for number, ids in enumerate(words, 1)]
        official = read_official("biomedparse", weights)
        if any(".language_encoder." in key for key in official.state):
            other = "BiomedParse v2, another network, for slices of volumes, whose layout is not known here"
            raise CheckpointError(f"{official.path} holds {other}: give biomedparse_v1.pt.")
        with fixed_initialisation():
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
    """Return CLIP's token ids of prompts, from the start to the end token; nothing is downloaded."""
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
