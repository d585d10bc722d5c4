"""The parts of a step by name, for whoever wants to know where its time goes. Unwatched, a part costs a function call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

DATA, PREPARE, FORWARD, GATHER = "data wait", "to device, augment", "forward", "gather"
LOSS, BACKWARD, REDUCE, OPTIMIZER = "loss", "backward", "all-reduce", "optimizer"
PARTS = (DATA, PREPARE, FORWARD, GATHER, LOSS, BACKWARD, REDUCE, OPTIMIZER)

Watch = Callable[[str], AbstractContextManager[object]]
_nothing = nullcontext()
_watch: Watch | None = None


def part(name: str) -> AbstractContextManager[object]:
    """Around the code of one of PARTS; parts may lie in others, which then do not count them."""
    return _nothing if _watch is None else _watch(name)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Have `watch` make the contexts of all parts in this process."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before
