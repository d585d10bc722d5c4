"""Class names as a person reads them."""

from __future__ import annotations

import re
import unicodedata
import zoneinfo
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

CODE_POINTS = re.compile(r"[0-9a-f]{2,5}(-[0-9a-f]{2,5})*")
LETTER_A, LETTER_Z = 0x1F1E6, 0x1F1FF  # regional indicators: two of them are a country's flag
TAG_A, TAG_Z, BLACK_FLAG = 0xE0061, 0xE007A, 0x1F3F4  # tags behind a black flag: a region's
KEYCAP = 0x20E3
PEOPLE = {0x1F468: "man", 0x1F469: "woman", 0x1F466: "boy", 0x1F467: "girl", 0x1F9D1: "adult", 0x1F9D2: "child"}
REGIONS = {"gbeng": "England", "gbsct": "Scotland", "gbwls": "Wales"}


def reader(names: Iterable[str]) -> Callable[[str], str]:
    """How the classes of one data set are read: as they are, or in words where all of them are emoji's code points.

    Numbers such as `10` are code points too, but none of a pictogram.
    """
    names = list(names)
    points = [chr(int(point, 16)) for name in names if CODE_POINTS.fullmatch(name) for point in name.split("-")]
    if not names or not all(map(CODE_POINTS.fullmatch, names)):
        return str
    pictures = sum(unicodedata.category(point) == "So" for point in points)
    return emoji if pictures > 0.6 * len(points) else str


def emoji(name: str) -> str:
    """`1f1e9-1f1ea` -> `flag: Germany`, `1f550` -> `clock face one oclock`, `23-20e3` -> `keycap: #`."""
    points = [int(point, 16) for point in name.split("-")] if CODE_POINTS.fullmatch(name) else []
    if len(points) == 2 and all(LETTER_A <= p <= LETTER_Z for p in points):
        letters = "".join(chr(p - LETTER_A + ord("A")) for p in points)
        return f"flag: {_countries().get(letters, letters)}"
    if len(points) > 2 and points[0] == BLACK_FLAG and all(TAG_A <= p <= TAG_Z for p in points[1:]):
        letters = "".join(chr(p - TAG_A + ord("a")) for p in points[1:])
        return f"flag: {REGIONS.get(letters, letters)}"
    if len(points) == 2 and points[1] == KEYCAP:
        return f"keycap: {chr(points[0])}"
    if len(points) > 1 and all(p in PEOPLE for p in points):
        return f"family: {', '.join(PEOPLE[p] for p in points)}"
    words = [unicodedata.name(chr(p), f"U+{p:X}") for p in points]
    return " + ".join(word if word.startswith("U+") else word.lower() for word in words) or name


@cache
def _countries() -> dict[str, str]:
    """Code -> name, from the system's list of time zones; empty where there is none."""
    for folder in zoneinfo.TZPATH:
        file = Path(folder) / "iso3166.tab"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return dict(line.split("\t", 1) for line in lines if "\t" in line and not line.startswith("#"))
    return {}
