"""Writes the configs of all bundles: `make bundles` writes, `--check` compares.

Each JSON in this folder with a list `parts` is a bundle; `amkd_monai/bundles/merge.py` has the rules, the folder beside
it the parts that bundles share.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from amkd_monai.bundles.merge import bundle_files

SOURCE = Path(__file__).parent
BUNDLES = SOURCE.parent


def main() -> None:
    """Write the generated files of all bundles, or say which differ."""
    parser = argparse.ArgumentParser(description="Write the configs of all bundles from bundles/source.")
    parser.add_argument("--check", action="store_true", help="write nothing and fail if a file would change")
    check = parser.parse_args().check
    wrong = []
    for part in sorted(SOURCE.glob("*.json")):
        if "parts" not in (own := json.loads(part.read_text())):
            continue
        folder = BUNDLES / part.stem
        texts = bundle_files(part.stem, own, SOURCE) | {"LICENSE": (BUNDLES.parent / "LICENSE").read_text()}
        files = {folder / path: text for path, text in texts.items()}
        wrong += sorted(set((folder / "configs").glob("*")) - set(files))
        wrong += [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
        for path, text in files.items() if not check else ():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if check and wrong:
        names = ", ".join(str(path.relative_to(BUNDLES)) for path in wrong)
        sys.exit(
            f"Not as bundles/source says: {names}. Edit bundles/source, run `make bundles` and remove "
            "files that it does not write."
        )


if __name__ == "__main__":
    main()
