"""Prompts as CLIP's tokens, by its published merge list and without any download."""

from __future__ import annotations

import gzip
import importlib.metadata
import itertools
import re
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

from amkd_monai.teachers.biomedparse.text import CONTEXT, VOCABULARY

START, END = VOCABULARY - 2, VOCABULARY - 1
MERGES = VOCABULARY - 2 - 2 * 256
DISTRIBUTION, FILENAME = "open_clip_torch", "bpe_simple_vocab_16e6.txt.gz"
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
REMEDY = f"give `token_ids`, a `vocabulary` file ({FILENAME} or CLIP's merges.txt), or run `pip install {DISTRIBUTION}`"


def find_vocabulary() -> Path:
    """Return the merge list that the distribution ``open_clip_torch`` ships.

    Raises:
        ValueError: it is not installed.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == FILENAME]
    if not found or not found[0].is_file():
        raise ValueError(f"BiomedParse's prompts need CLIP's vocabulary, which is not installed: {REMEDY}.")
    return found[0]


def check_ids(ids: Sequence[int], prompt: str) -> list[int]:
    """Return a prompt's ids up to the first end token; the padding after it has no effect.

    Raises:
        ValueError: the ids are not those of a prompt.
    """
    kept = list(ids[: ids.index(END) + 1]) if isinstance(ids, Sequence) and END in ids else []
    if not 3 <= len(kept) <= CONTEXT or kept[0] != START or not all(0 <= i < START for i in kept[1:-1]):
        raise ValueError(
            f"The prompt {prompt} has token ids that are not of its kind: give {START}, then 1 to {CONTEXT - 2} ids "
            f"of word pieces below {START}, then {END}."
        )
    return kept


class Vocabulary:
    """CLIP's byte-pair encoding (Radford et al., ICML 2021; Sennrich et al., ACL 2016).

    Args:
        path: the published merge list, gzipped or not; None takes the one of the distribution ``open_clip_torch``.

    Raises:
        ValueError: the file is missing, damaged, or of something else.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        path = find_vocabulary() if path is None else Path(path)
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw).decode()
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read as CLIP's vocabulary ({error}): {REMEDY}.") from error
        pairs = [tuple(line.split()) for line in text.splitlines()[1 : MERGES + 1]]
        if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{path} does not list CLIP's {MERGES} merges: {REMEDY}.")
        order = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        hidden = [byte for byte in range(256) if byte not in order]  # blanks and controls get letters of their own
        self.letters = {byte: chr(byte) for byte in order} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        single = list(self.letters.values())
        pieces = [*single, *(letter + "</w>" for letter in single), *("".join(pair) for pair in pairs)]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.ids = {piece: i for i, piece in enumerate(pieces)}

    def tokenise(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, from the start to the end token.

        Raises:
            ValueError: the prompt is empty or too long.
        """
        ids = [START]
        apart = "".join(f" {c} " if unicodedata.category(c)[0] == "N" else c for c in prompt.lower())
        for word in WORD.findall(apart):
            pieces = [self.letters[byte] for byte in word.encode()]
            pieces[-1] += "</w>"
            while len(pieces) > 1:
                best = min(itertools.pairwise(pieces), key=lambda pair: self.ranks.get(pair, MERGES))
                if best not in self.ranks:
                    break
                pieces = _merge(pieces, best)
            ids += [self.ids[piece] for piece in pieces]
        return check_ids([*ids, END], f"'{prompt}'")


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
