"""Check the links of the documentation: files and headings of the repository, and on request other sites.

python docs/tools/links.py              # exit code 1 if a file or a heading is missing
python docs/tools/links.py --external   # also asks other sites; exit code 1 if one answers that a page is gone

A heading must have its anchor on GitHub and on the site, whose rules differ. A site that cannot be reached or that
refuses programs is listed and no error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("bundles/*/docs/README.md"),
    *ROOT.glob("docs/*.ipynb"),
]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)|<(https?://[^>\s]+)>")
GONE = (404, 410)


def text_of(page: Path) -> str:
    """Return the Markdown of a page or of a notebook's text cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures, in order; code holds none."""
    return [inline or plain for inline, plain in LINK.findall(CODE.sub("", text_of(page)))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that both GitHub and the site give to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    rules = []
    for spaces, joint in ((r"\s", "-"), (r"[-\s]+", "_")):  # GitHub turns each space into a dash, the site several
        seen, names = Counter[str](), set()
        for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
            plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
            name = re.sub(spaces, "-", plain)
            names.add(f"{name}{joint}{seen[name]}" if seen[name] else name)
            seen[name] += 1
        rules.append(names)
    return set.intersection(*rules)


def missing(page: Path) -> Iterator[str]:
    """Yield the links of a page that lead to no file, outside the repository or to no heading."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.is_relative_to(ROOT) or not file.exists():
            yield f"{page.relative_to(ROOT)}: there is no file {target}"
        elif anchor and anchor not in anchors(file):
            yield f"{page.relative_to(ROOT)}: there is no heading {target}"


def answer(address: str) -> str:
    """Ask a site for a page: `good`, `gone`, or why neither is known."""
    try:
        with urlopen(Request(address, headers={"User-Agent": "Mozilla/5.0 (link checker)"}), timeout=15):
            return "good"
    except HTTPError as error:
        return "gone" if error.code in GONE else f"not known, the site answers {error.code}"
    except (OSError, ValueError) as error:
        return f"not known, {getattr(error, 'reason', error)}"


def main() -> int:
    """Print what is missing and, on request, what other sites answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--external", action="store_true", help="also ask other sites")
    arguments = parser.parse_args()
    problems = [problem for page in PAGES for problem in missing(page)]
    addresses = sorted({target for page in PAGES for target in links(page) if target.startswith("http")})
    print(*problems, sep="\n", end="\n" if problems else "")
    if arguments.external:
        with ThreadPoolExecutor(8) as pool:
            answers = dict(zip(addresses, pool.map(answer, addresses), strict=True))
        for address, text in answers.items():
            if text != "good":
                print(f"{address}: {text}")
        problems += [address for address, text in answers.items() if text == "gone"]
        print(f"{list(answers.values()).count('good')} of {len(addresses)} addresses answer")
    print(f"{sum(len(links(page)) for page in PAGES)} links on {len(PAGES)} pages, {len(problems)} broken")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
