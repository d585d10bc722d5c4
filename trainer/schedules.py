"""The learning rate of every step."""

from __future__ import annotations

import bisect
import math

from configs.schema import Optim


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of optimizer step `step` in 1..steps: linear warm-up, then the schedule.

    cosine and linear come down to `final_lr * lr`; step multiplies with `factor` after each milestone.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "step":
        return optim.lr * optim.factor ** bisect.bisect_left(optim.milestones, step)
    done = (step - 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[optim.schedule]
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * share)
