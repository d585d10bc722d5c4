"""The space of a sweep: which settings it decides, and from what. Each point follows from the space, a seed and a number."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from configs.plain import refuse_odd, shorten, suggest

RANGES = {
    "uniform": "[low, high]",
    "loguniform": "[low, high], both above 0",
    "quniform": "[low, high, step]",
    "randint": "[low, high], whole numbers, both included",
}
KINDS = ("choice", "grid", *RANGES)
FORMS = "a list of values, or one of {choice: [...]}, {grid: [...]}, " + ", ".join(
    f"{{{kind}: {form.partition(']')[0]}]}}" for kind, form in RANGES.items()
)
USUAL_TRIALS = 10
ATTEMPTS = 100  # to find a point that is new and can be trained, besides 50 for each point of a small space
Point = dict[str, Any]  # dotted setting -> value


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. values: all there are of `choice` and `grid`; else the range, as it was written."""

    key: str
    kind: str
    values: tuple[Any, ...]

    def ends(self) -> tuple[Any, ...]:
        """What must be possible for all of it to be: each choice, or both ends of the range."""
        if self.kind == "quniform":
            return (self._step(0), self._step(self._num_steps()))
        return self.values

    def draw(self, random: Random) -> Any:
        """A value; of a grid none is drawn."""
        if self.kind == "choice":
            return random.choice(self.values)
        if self.kind == "randint":
            return random.randint(*self.values)
        if self.kind == "quniform":
            return self._step(random.randint(0, self._num_steps()))
        low, high = self.values
        if self.kind == "loguniform":
            return min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)
        return random.uniform(low, high)

    @property
    def size(self) -> float:
        """How many values there are; inf for a range of real numbers."""
        if self.kind in ("choice", "grid"):
            return len(self.values)
        if self.kind == "randint":
            return float(self.values[1] - self.values[0] + 1)
        return self._num_steps() + 1 if self.kind == "quniform" else math.inf

    def _num_steps(self) -> int:
        low, high, step = self.values
        return int((high - low) / step + 1e-9)

    def _step(self, number: int) -> Any:
        low, _, step = self.values
        value = low + number * step
        return value if isinstance(value, int) else round(value, 12)


@dataclass(frozen=True, slots=True)
class Space:
    """All settings that a sweep decides."""

    settings: tuple[Setting, ...]

    @property
    def num_cells(self) -> int:
        """Combinations of what is to be tried in full; 1 without a grid."""
        return math.prod(len(one.values) for one in self.settings if one.kind == "grid")

    @property
    def size(self) -> float:
        return math.prod(one.size for one in self.settings)

    def num_trials(self, asked: int | None) -> int:
        """`asked`, or the usual number. Raises ValueError for more points than there are, and for less than the grid."""
        most = min(self.size, 10**9)
        if asked is None:
            gridded = any(one.kind == "grid" for one in self.settings)
            return self.num_cells if gridded else int(min(USUAL_TRIALS, most))
        if asked > most:
            raise ValueError(f"--trials {asked}: the space has {most:g} different points; take at most so many")
        if asked < self.num_cells:
            raise ValueError(f"--trials {asked}: the grid has {self.num_cells} points; take so many, or use choice for grid")
        return asked

    def draw(self, count: int, seed: int, reason: Callable[[Point], str | None]) -> list[Point]:
        """The first `count` points, all different; one that has a `reason` against it is drawn again.

        They do not depend on `count`. Raises ValueError with the last reason when there is no further point.
        """
        taken: set[str] = set()
        found: list[Point] = []
        attempts = ATTEMPTS + int(min(50 * self.size, 10**4))
        for number in range(count):
            why: str | None = None
            for attempt in range(attempts):
                point = self._point(seed, number, attempt)
                if (name := json.dumps(point)) in taken:
                    continue
                why = reason(point)
                if why is None:
                    taken.add(name)
                    found.append(point)
                    break
            else:
                raise ValueError(f"only {number} of {count} points can be trained: {why or 'lower --trials'}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {one.key: {one.kind: list(one.values)} for one in self.settings}

    def _point(self, seed: int, number: int, attempt: int) -> Point:
        """Each setting has random numbers of its own, so that one more setting leaves the others as they are."""
        grids = [one for one in self.settings if one.kind == "grid"]
        cells = list(itertools.islice(itertools.product(*(one.values for one in grids)), number % self.num_cells, None, None))
        fixed = dict(zip((one.key for one in grids), cells[0], strict=True))
        return {
            one.key: fixed[one.key] if one.key in fixed else one.draw(Random(f"{seed} {number} {attempt} {one.key}"))
            for one in self.settings
        }


def parse_space(settings: Mapping[str, Any], *, where: str) -> Space:
    """A space from a mapping of dotted settings. Raises ValueError, under `where`, that names the setting."""
    try:
        refuse_odd(settings)
        if not settings:
            raise ValueError("decides nothing; write for instance  optim.lr: {loguniform: [1e-4, 1e-2]}")
        found = tuple(_setting(key, value) for key, value in settings.items())
        _refuse_twice([one.key for one in found])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Space(found)


def _setting(key: str, value: Any) -> Setting:
    if isinstance(value, list):
        return Setting(key, "choice", _several(key, "choice", value))
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {shorten(value)} decides nothing; give {FORMS}; what is fixed belongs into CONFIG")
    if len(value) != 1 or not isinstance(next(iter(value.values())), list):
        raise ValueError(f"{key}: {shorten(value)} is no range; give {FORMS} (and nested settings with a dot: {key}.NAME)")
    kind, values = next(iter(value.items()))
    if kind not in KINDS:
        raise ValueError(f"{key}: no kind {kind!r}; {suggest(kind, KINDS)}")
    return Setting(key, kind, _range(key, kind, values) if kind in RANGES else _several(key, kind, values))


def _several(key: str, kind: str, values: list[Any]) -> tuple[Any, ...]:
    if not values:
        raise ValueError(f"{key}: an empty {kind}; list the values")
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise ValueError(f"{key}: {kind} {shorten(values)} has a value twice; leave one out")
    return tuple(values)


def _range(key: str, kind: str, values: list[Any]) -> tuple[Any, ...]:
    plain = [one for one in values if isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one)]
    whole = kind != "randint" or all(isinstance(one, int) for one in plain)
    if len(plain) != len(values) or len(values) != (3 if kind == "quniform" else 2) or not whole:
        raise ValueError(f"{key}: {kind} takes {RANGES[kind]}; got {shorten(values)}")
    low, high = values[0], values[1]
    if low >= high:
        turned = [high, low, *values[2:]] if low > high else "two different numbers"
        raise ValueError(f"{key}: {kind} {values}: low must be below high; write {turned}")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"{key}: loguniform {values}: low must be above 0; a uniform range may begin there")
    if kind == "quniform" and not 0 < values[2] <= high - low:
        raise ValueError(f"{key}: quniform {values}: the step must be above 0 and at most {high - low:g}")
    return tuple(values)


def _refuse_twice(keys: list[str]) -> None:
    for one, other in itertools.permutations(keys, 2):
        if other.startswith(f"{one}."):
            raise ValueError(f"{one} and {other} both decide {other}; leave one of them out")
