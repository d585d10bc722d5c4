"""What the steps add up to: hours, GPU hours, and money."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.check import number_of_steps
from cluster.plan.scale import Facts, Scale


@dataclass(frozen=True, slots=True)
class Budget:
    """Of the whole run, evaluation and start left out."""

    steps: int
    epoch_steps: int
    epoch_h: float
    run_h: float
    gpu_h: float
    cost: float | None


def budget(scale: Scale, facts: Facts, price: float | None) -> Budget:
    """`price`: of one GPU for an hour."""
    data = facts.config.data
    steps = number_of_steps(facts.config, facts.data.units_per_epoch)
    epoch_steps = math.ceil(facts.data.units_per_epoch / (data.batch // (data.per_class or 1)))
    run_h = steps * scale.times.step / 3600
    gpu_h = run_h * scale.world
    return Budget(
        steps, epoch_steps, epoch_steps * scale.times.step / 3600, run_h, gpu_h, None if price is None else gpu_h * price
    )
