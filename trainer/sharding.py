"""Parameters of which every rank holds its own rows: one checkpoint for any number of ranks, one norm over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer import collectives
from trainer.centres import Centres


def sharded_modules(module: nn.Module) -> dict[str, Centres]:
    """Name -> part of `module` whose parameters are sharded."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Centres) and part.sharded}


def sharded_parameters(module: nn.Module) -> dict[nn.Parameter, Centres]:
    """The parameters that `sharded_modules` hold."""
    return {p: part for part in sharded_modules(module).values() for p in part.sharded_parameters()}


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with all rows of sharded parameters. Collective: every rank calls it."""
    state = dict(module.state_dict())
    for name, part in sharded_modules(module).items():
        state |= {_join(name, key): tensor for key, tensor in part.gather_state().items()}
    return state


def own_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `module.load_state_dict` takes on this rank, from what `whole_state` gave on any number of ranks."""
    own = dict(state)
    for name, part in sharded_modules(module).items():
        for key, _ in part.named_parameters():
            own[_join(name, key)] = part.keep_rows(state[_join(name, key)])
    return own


def whole_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()` with all rows of the moments of sharded parameters. Collective: every rank calls it."""
    return _moments(optimizer, optimizer.state_dict(), module, lambda part, moment: part.gather_rows(moment))


def own_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes on this rank."""
    return _moments(optimizer, state, module, lambda part, moment: part.keep_rows(moment))


def clip_(parameters: Sequence[nn.Parameter], module: nn.Module, max_norm: float | None) -> Tensor:
    """Scale all gradients so that their norm over all ranks is at most `max_norm`; returns the norm before, a scalar.

    A sharded parameter's rows are added up over ranks, the others are the same on each. Collective: every rank calls it.
    """
    sharded = sharded_parameters(module)
    whole = [p.grad for p in parameters if p.grad is not None and p not in sharded]
    norm = nn.utils.get_total_norm(whole)
    if sharded:
        own = nn.utils.get_total_norm([p.grad for p in sharded if p.grad is not None])
        norm = (norm.double().square() + collectives.total(own.double().square())).sqrt().to(norm.dtype)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _moments(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], module: nn.Module, change: Callable[[Centres, Tensor], Tensor]
) -> dict[str, Any]:
    sharded = sharded_parameters(module)
    if not sharded:
        return state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    changed = {}
    for index, held in state["state"].items():
        part = sharded.get(parameters[index])
        # Moments have the parameter's rows; the step count is a scalar.
        changed[index] = held if part is None else {k: change(part, t) if t.ndim else t for k, t in held.items()}
    return {**state, "state": changed}


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
