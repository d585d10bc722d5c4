"""Values for a setting: those that may well be right, and those that are hardly ever."""

from __future__ import annotations

import datetime
import math
import types
import typing
from random import Random
from typing import Any, Literal, Union, get_args, get_origin

BAD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "7", "1e400", "\0", "\ud800", "é" * 300, "~nobody-at-all/x", "a/b", " ", "-"),
    *(0, -1, 1, 3, 10**6, 10**9, 10**12, 10**18, 2**63, 10**30, -(10**30), 10**4200),
    *(0.5, -0.5, 1.0, 1e-300, 1e-30, 1e30, 1e300, -1e300, math.nan, math.inf, -math.inf),
    *([], [1], [0, 0], [2, 1], [1, 2, 3], ["a"], [[[]]], [math.nan, 1], {}, {"a": 1}, {"name": "x"}, {1: 2}),
    datetime.date(2024, 2, 29),
)
BAD_PATHS = (
    *("{place}/nothing", "{place}/file", "{place}/file/below", "{place}/empty", "{place}/images", "{place}", "/proc/none/x"),
    *("nosuch://bucket/x", "s3:x", "://x", "http://127.0.0.1:9/x", "~nobody-at-all/x", "x" * 300, "x\0y", "", "models:/x@y"),
    *("models:/", "sqlite:///{place}/file/x.db", "sqlite:////proc/none/x.db", "sqlite:x", "sqlite://", "file:///{place}/x"),
)
HUGE = (10**5, 10**6, 10**9, 10**12, 10**15, 1e9, 1e15)


def bad_value(random: Random, hint: Any) -> Any:
    """Most of the time nothing that `hint` allows."""
    if _names_a_path(hint) and random.random() < 0.7:
        return random.choice(BAD_PATHS)
    if _is_number(hint) and random.random() < 0.35:
        return random.choice(HUGE)
    if random.random() < 0.15:
        value = plausible_value(random, hint)
        return [value] if random.random() < 0.5 else {"value": value}
    return random.choice(BAD)


def plausible_value(random: Random, hint: Any) -> Any:
    """Of the type that `hint` asks for, small and often good."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return plausible_value(random, inner[0])
    if origin is Literal:
        return random.choice(inner)
    if origin in (Union, types.UnionType):
        return plausible_value(random, random.choice(inner))
    if origin is tuple and inner[-1] is not Ellipsis:
        return sorted((plausible_value(random, one) for one in inner), key=str)
    if origin is not None:
        return [plausible_value(random, inner[0]) for _ in range(random.randint(1, 3))]
    if hint is bool:
        return random.random() < 0.5
    if hint is int:
        return random.choice([1, 2, 3, 4, 5, 7, 8, 10, 16, 20, 32, 48, 64])
    if hint is float:
        return random.choice([0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5, 2.0, 10.0, 100.0])
    return random.choice(["recall_at_1", "map_at_r", "body", "head", "x1"]) if hint is str else None


def _names_a_path(hint: Any) -> bool:
    return hint is str or str in get_args(hint) or any(_names_a_path(one) for one in get_args(hint))


def _is_number(hint: Any) -> bool:
    return hint in (int, float) or any(_is_number(one) for one in get_args(hint))
