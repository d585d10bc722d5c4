"""Ranks that differ in what they wish and in their pace do the same at the same step."""

from __future__ import annotations

import time
from itertools import count

import torch

from tests.ranks import run_ranks
from trainer import collectives
from trainer.agreement import MOST_STEPS, Agreement, Wish


def until_stopped(pauses: tuple[float, ...]) -> tuple[list[int], int]:
    """The last rank wishes to save at the third time it is asked and to stop at the fifth.  -> steps of SAVE, of STOP"""
    last = collectives.rank() == collectives.world() - 1
    asked = count(1)
    wishes = {3: Wish.SAVE, 5: Wish.STOP} if last else {}
    agreement = Agreement(lambda: wishes.get(next(asked), Wish.NONE), 10, torch.device("cpu"))
    saves = []
    for step in count(11):
        time.sleep(pauses[collectives.rank()])
        wish = agreement.at(step)
        if wish is Wish.SAVE:
            saves.append(step)
        if wish is Wish.STOP:
            return saves, step
    raise AssertionError


def test_what_one_rank_wishes_all_do_at_the_same_step() -> None:
    for pauses in ((0.0,), (0.001, 0.01), (0.05, 0.0, 0.02)):
        found = run_ranks(len(pauses), until_stopped, pauses)
        assert len({(tuple(saves), stop) for saves, stop in found}) == 1
        saves, stop = found[0]
        assert len(saves) == 1
        assert 13 <= saves[0] < stop <= 11 + 4 * MOST_STEPS


def test_ranks_that_are_slow_ask_each_other_at_every_step_and_fast_ones_seldom() -> None:
    slow, fast = Agreement(lambda: Wish.STOP, 0, torch.device("cpu")), []
    for step in (1, 2, 3):
        time.sleep(0.6)
        assert slow.at(step) is Wish.STOP
    quick = Agreement(lambda: fast.append(1) or Wish.NONE, 0, torch.device("cpu"))  # type: ignore[func-returns-value]
    for step in range(1, 101):
        assert quick.at(step) is Wish.NONE
    assert len(fast) <= 2
