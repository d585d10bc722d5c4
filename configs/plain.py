"""What any setting may hold, before anything is known of it: plain values of a sane size."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_UNPRINTABLE = ("Cc", "Cs")  # control characters, halves of pairs
MOST_VALUES, DEEPEST, LONGEST = 10_000, 20, 4096
LARGEST = 2**63


def refuse_odd(settings: Mapping[Any, Any]) -> None:
    """Raise ValueError that names the first setting which is nothing a config can mean, and never be long about it."""
    for count, (path, value) in enumerate(_walk(settings, "")):
        if count >= MOST_VALUES or path.count(".") >= DEEPEST:
            most = f"{DEEPEST} levels" if count < MOST_VALUES else f"{MOST_VALUES} values"
            raise ValueError(f"{path.partition('.')[0]}: more than {most} in all, or an alias of what it is in; write less")
        reason = _odd(value)
        if reason is not None:
            raise ValueError(f"{path}: {reason}")


def shorten(value: Any) -> str:
    """`repr` of a value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value with its dotted path, outer ones first."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, one in inner:
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and not isinstance(key, str):
            raise ValueError(f"{here}: a setting's name is a word, got {shorten(key)}")
        yield here, one
        yield from _walk(one, here)


def _odd(value: Any) -> str | None:
    """What is wrong with a value, or None."""
    if isinstance(value, str):
        strange = next((sign for sign in value if unicodedata.category(sign) in _UNPRINTABLE and not sign.isspace()), None)
        if strange is not None:
            return f"the text holds {strange!r}, which cannot be printed; leave it out"
        return f"a text of {len(value)} characters; at most {LONGEST}" if len(value) > LONGEST else None
    if isinstance(value, int):
        return None if -LARGEST <= value < LARGEST else "a whole number beyond 64 bits"
    if value is None or isinstance(value, (float, list, tuple, Mapping)) or hasattr(value, "__pydantic_fields__"):
        return None
    return f"a {type(value).__name__} is no setting; put it in quotes if a text is meant"
