"""The generators that dropout draws from, for a checkpoint.

Every rank goes on with its own numbers on as many ranks as before; on another number, rank r takes those of rank r modulo
the number that was saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer import collectives


def gathered(device: torch.device) -> dict[str, Tensor]:
    """States of all ranks' generators, "cpu" and for a GPU "cuda", bytes [W, n] each. Collective: every rank calls it."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    ones = [1] * collectives.world()
    return {name: collectives.gather(state[None].to(device), ones).cpu() for name, state in states.items()}


def restore(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set this rank's generators to what `gathered` gave."""
    # Copied: given a view into a larger tensor, torch reads from where that begins, and beyond its end.
    mine = {name: every[collectives.rank() % len(every)].clone() for name, every in states.items()}
    if "cpu" in mine:
        torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], device)
