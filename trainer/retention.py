"""Which checkpoints stay."""

from __future__ import annotations

import math
from collections.abc import Mapping


def superfluous(values: Mapping[int, float | None], newest: int, *, keep: int) -> list[int]:
    """Steps to drop of those in `values`, once the one of step `newest` is written.

    values: step -> how good (larger is better), None where it is not known. Later steps than `newest`
    are of a run that went back behind them: they go too. The earliest of equal best ones stays.
    """
    past = sorted(step for step in values if step <= newest)
    stay = set(past[-keep:])
    known = {step: value for step in past if (value := values[step]) is not None and math.isfinite(value)}
    if known:
        stay.add(max(known, key=lambda step: (known[step], -step)))
    return [step for step in values if step not in stay]
