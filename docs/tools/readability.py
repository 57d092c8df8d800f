"""Readability of the documentation: words, words per sentence and Flesch reading ease of every page.

python docs/tools/readability.py                       # README.md, CONTRIBUTING.md, docs and pages of bundles
python docs/tools/readability.py --worst 30 README.md  # and the sentences that are hardest to read

Prose counts, cells of tables and items of lists as sentences of their own; headings, code and fragments of fewer than
six words do not, nor do references. Code in a sentence is one word of two syllables. Flesch: 206.8 - 1.015
words/sentence - 84.6 syllables/word; above 50 is easy for a text of this field.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING")), *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("bundles/*/docs/README.md"))
NOT_PROSE = re.compile(
    r"^```.*?^```|^## References\n.*?(?=^## |\Z)|^(?: {4}|#|!\[).*?$|^---.*?^---|<[^>]+>", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z\"(*0-9])|(?<=[.!?])\s*$|\n\s*\n|\n(?=\s*(?:[-*]|\d+\.|\|) ?)|\s\|\s")


def sentences(text: str) -> list[list[str]]:
    """Split a Markdown page into sentences of words."""
    text = re.sub(r"`[^`]+`", "coded", LINK.sub(r"\1", NOT_PROSE.sub("\n\n", text)))
    found = (re.findall(r"[A-Za-z][A-Za-z'-]*|\d[\d.,]*", part) for part in END.split(text) if part)
    return [words for words in found if len(words) >= 6]


def syllables(word: str) -> int:
    """Count groups of vowels, without a silent e at the end; a number counts as one."""
    groups = len(re.findall(r"[aeiouy]+", word.lower()))
    return max(1, groups - (word.lower().endswith("e") and not word.lower().endswith("le")))


def flesch(found: list[list[str]]) -> float:
    """Return the Flesch reading ease of sentences."""
    words = [word for sentence in found for word in sentence]
    return 206.835 - 1.015 * len(words) / len(found) - 84.6 * sum(map(syllables, words)) / len(words)


def grade(words: list[str]) -> float:
    """Return the Flesch-Kincaid grade of one sentence: years of school."""
    return 0.39 * len(words) + 11.8 * sum(map(syllables, words)) / len(words) - 15.59


def main() -> None:
    """Print a line for each page, and on request the sentences of the highest Flesch-Kincaid grade."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--worst", type=int, default=0)
    arguments = parser.parse_args()
    hard: list[tuple[float, str, str]] = []
    print(f"{'page':24} {'words':>6} {'words/sentence':>15} {'Flesch':>7}")
    for page in arguments.pages:
        text = page.read_text(encoding="utf-8")
        name = page.resolve().relative_to(ROOT).as_posix().removesuffix("/docs/README.md").removeprefix("docs/")
        if found := sentences(text):
            rate = sum(map(len, found)) / len(found)
            print(f"{name:24} {len(text.split()):6} {rate:15.1f} {flesch(found):7.1f}")
            hard += [(grade(words), name, " ".join(words)) for words in found]
    for score, where, sentence in sorted(hard, reverse=True)[: arguments.worst]:
        print(f"{score:6.1f} {where}: {sentence}")


if __name__ == "__main__":
    main()
