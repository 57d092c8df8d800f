"""Data that stand in for others: a file in their folder says so, and whatever is made of them repeats it."""

from __future__ import annotations

from pathlib import Path

STAND_IN_MARKER = "STAND-IN.txt"
"""Text file in a data set's folder that says, in its first line, which data these are and what they stand in for."""


def stand_in_note(folder: str | Path) -> str:
    """Return what a folder says about being a stand-in, empty if it says nothing.

    Raises:
        ValueError: the file is empty or no text.
    """
    marker = Path(folder) / STAND_IN_MARKER
    if not marker.is_file():
        return ""
    try:
        lines = marker.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{marker} is no text ({error}): write one line that says what the data are.") from error
    if not (note := lines[0].strip()):
        raise ValueError(f"{marker} has no first line: write there what the data are and what they stand in for.")
    return note
