"""An encoder as a sequence of stages, from the input to the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

Stages = Sequence[Sequence[str]]


def stages_of(encoder: nn.Module) -> Stages:
    """Prefixes of parameter names, stage by stage: the encoder's own `stages`, else its direct parts."""
    own: Stages | None = getattr(encoder, "stages", None)
    return own if own is not None else [[name] for name, _ in encoder.named_children()]


def stages_around(model: nn.Module, prefix: str) -> list[list[str]]:
    """Stages of a model that holds its blocks in a list: what comes before them, then each block.

    The longest list counts; what follows it is in no stage. Names begin with `prefix`.
    """
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    names = [name for name, _ in model.named_parameters()]
    if not lists:
        return [[prefix + name] for name in names]
    blocks, held = max(lists, key=lambda found: len(found[1]))
    first = next((i for i, name in enumerate(names) if name.startswith(f"{blocks}.")), len(names))
    return [[prefix + name for name in names[:first]], *([f"{prefix}{blocks}.{i}"] for i in range(len(held)))]


def stage_numbers(encoder: nn.Module) -> dict[str, int]:
    """Parameter name -> number of its stage; what belongs to none comes after the last."""
    stages = stages_of(encoder)
    return {
        name: next((i for i, stage in enumerate(stages) if matches(name, stage)), len(stages))
        for name, _ in encoder.named_parameters()
    }


def matches(name: str, prefixes: Iterable[str]) -> bool:
    """Whether `name` is one of the prefixes or lies under one: `body.1` covers `body.1.weight`, not `body.10.weight`."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
