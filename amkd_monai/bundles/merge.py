"""Builds bundle configs from parts: those of this folder, which all bundles share, and the bundle's own.

A bundle is a part with a list `parts`: those parts are merged in that order, then its own. In the merged part each key
other than `parts` and `values` is a file of `configs/`. Rules:

- objects merge by key; anything else, lists included, replaces what was there;
- `"<absent>"` as a value removes the key or keeps a place for it, `"<same>"` keeps the value;
- a new key stands after the key that is named before it, without one at the end; `_target_` always stands first;
- `"<name>"` stands for `values.name`; a list is spliced into the list that names it; inside a longer text, and in keys,
  it stands for a text. `<bundle>` is the bundle's name.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = Path(__file__).with_name("parts")
ABSENT, SAME = "<absent>", "<same>"
NAME = re.compile(r"<(\w+)>")


def merge(base: Any, override: Any, place: str = "") -> Any:
    """Merge two pieces of a part by the rules above; removed keys stay as `<absent>` until `resolved`."""
    if not (isinstance(base, dict) and isinstance(override, dict)):
        return override
    keys, merged, after = list(base), dict(base), len(base)
    for key, value in override.items():
        if key in base:
            after = keys.index(key) + 1
            if value != SAME:
                merged[key] = merge(base[key], value, f"{place}/{key}")
        else:
            if value == SAME:
                raise ValueError(f"{place}/{key} is {SAME}, but no earlier part has this key: remove it.")
            keys.insert(0 if key == "_target_" else after, key)
            merged[key], after = value, keys.index(key) + 1
    return {key: merged[key] for key in keys}


def resolved(node: Any, values: dict[str, Any]) -> Any:
    """Put values in the place of their names and leave out what is absent."""
    if isinstance(node, dict):
        filled = {resolved(key, values): resolved(value, values) for key, value in node.items()}
        return {key: value for key, value in filled.items() if value != ABSENT}
    if isinstance(node, list):
        elements: list[Any] = []
        for element in node:
            value = resolved(element, values)
            spliced = isinstance(element, str) and isinstance(value, list)
            elements.extend(value if spliced else [value])
        return elements
    if not isinstance(node, str) or node == ABSENT:
        return node

    def value_of(name: str) -> Any:
        if name not in values:
            raise ValueError(f"There is no value <{name}>: add it to `values` of a part, or correct the name.")
        return resolved(values[name], values)

    if whole := NAME.fullmatch(node):
        return value_of(whole[1])
    return NAME.sub(lambda found: str(value_of(found[1])), node)


def bundle_files(name: str, own: Mapping[str, Any], folder: Path = PARTS) -> dict[str, str]:
    """Return the text of each generated file of a bundle by its path in the bundle's folder.

    ``own`` is the bundle's part; the parts it names are looked for in ``folder`` before they are in the package.
    """
    merged: dict[str, Any] = {}
    for part in own["parts"]:
        file = next(place / f"{part}.json" for place in (folder, PARTS) if (place / f"{part}.json").is_file())
        merged = merge(merged, json.loads(file.read_text(encoding="utf-8")), part)
    merged = merge(merged, dict(own), name)
    values = {"bundle": name, **merged.pop("values", {})}
    configs = resolved({key: value for key, value in merged.items() if key != "parts"}, values)
    texts = {f"configs/{key}.json": json.dumps(value, indent=2) + "\n" for key, value in configs.items()}
    return texts | {"configs/logging.conf": (PARTS / "logging.conf").read_text(encoding="utf-8")}
