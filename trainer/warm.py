"""A warm start: the weights of another encoder, all of them or all but what is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from configs.schema import Encoder
from trainer.encoders.stages import matches

SHOWN = 8


def start_from(encoder: nn.Module, weights: Mapping[str, Tensor], *, skip: Sequence[str] = ()) -> None:
    """Overwrite the encoder's weights and statistics with those of the same name, but for those under the prefixes `skip`.

    Raises ValueError that lists what does not fit: nothing is left out in silence.
    """
    own = encoder.state_dict()
    unused = [prefix for prefix in skip if not any(matches(name, [prefix]) for name in {**own, **weights})]
    if unused:
        raise ValueError(f"encoder.init_skip: no weights under {unused[0]!r}")
    wanted = {name: tensor for name, tensor in own.items() if not matches(name, skip)}
    given = {name: tensor for name, tensor in weights.items() if not matches(name, skip)}
    wrong = [f"{name}: not there, here {list(t.shape)}" for name, t in wanted.items() if name not in given]
    wrong += [f"{name}: {list(t.shape)} there, not here" for name, t in given.items() if name not in wanted]
    both = [(name, given[name], t) for name, t in wanted.items() if name in given]
    wrong += [f"{name}: {list(there.shape)} there, here {list(t.shape)}" for name, there, t in both if there.shape != t.shape]
    if wrong:
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            "encoder.init: these weights do not fit this encoder; make the encoder section as it was there, or name their "
            "prefixes in encoder.init_skip to leave them as drawn:\n  " + "\n  ".join(wrong[:SHOWN]) + more
        )
    encoder.load_state_dict({**own, **given})


def begin_from(encoder: nn.Module, part: Encoder, weights: Mapping[str, Tensor]) -> None:
    """`start_from` for every network of an `encoder` section that has `init`; towers' weights begin with their side's name."""
    if part.anchor is None or part.positive is None:
        return start_from(encoder, weights, skip=part.init_skip) if part.init is not None else None
    for side, tower in (("anchor", part.anchor), ("positive", part.positive)):
        if tower.init is None:
            continue
        own = {name.removeprefix(f"{side}."): t for name, t in weights.items() if name.startswith(f"{side}.")}
        try:
            start_from(getattr(encoder, side), own, skip=tower.init_skip)
        except ValueError as error:
            raise ValueError(str(error).replace("encoder.", f"encoder.{side}.")) from error
    return None
