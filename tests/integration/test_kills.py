"""`kill -9` in every place, of everything or of one process: a reproducible run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from tests.integration.conftest import Reference
from tests.kills import PLACES, Place, Watched, kill, kill_alone, readers, while_checkpointing, while_evaluating
from tests.runs import assert_equal, curve, finish, ranks, standstill_s, start, train, wait_for


def folder_of(reference: Reference, name: str) -> Path:
    return Path(reference[1]["run"]).parent / name


def killed(reference: Reference, name: str, place: Place, *, after: int, workers: int, alone: bool = False, **how: Any) -> int:
    """Start a run, kill it (or its driver `alone`), and look at what it left; the last step that it logged."""
    run = folder_of(reference, name)
    driver = start(reference[0], name, f"cluster.workers={workers}", **how)
    last = kill(driver, run, place, after=after, alone=alone)
    left = list((run / "checkpoints").glob(".step-*"))
    assert bool(left) == (place is while_checkpointing), "the kill came in the middle"
    return last


def resumed(reference: Reference, name: str, *settings: str, **how: Any) -> dict[str, Any]:
    found = train(reference[0], name, *settings, resume=True, **how)
    assert not list((folder_of(reference, name) / "checkpoints").glob(".*"))
    return found


def test_a_run_killed_while_it_saves_and_while_it_evaluates_ends_as_if_nothing_had_happened(small: Reference) -> None:
    # Of the first start only the driver is killed, which ignores Ctrl-C as in the background of a shell: no rank lives on.
    killed(small, "kills", while_checkpointing, after=10, workers=2, alone=True, ctrl_c=signal.SIG_IGN)
    assert killed(small, "kills", while_evaluating, after=24, workers=1, resume=True) == 24
    assert_equal(resumed(small, "kills", "cluster.workers=2"), small[1])
    starts = [row["from_step"] for row in read_lines(folder_of(small, "kills") / "attempts.jsonl")]
    assert starts[0] == 0
    assert starts[1] in (6, 12, 18)  # the kill waits for a checkpoint that it catches
    assert starts[2] in (18, 24)  # the one at 24 may not have been whole yet


def evaluated_next(reference: Reference) -> int:
    """A step after which one with an evaluation comes; not the last one's."""
    steps = [int(row["step"]) for row in curve(reference[1]["run"]) if "val/recall_at_1" in row]
    return random.choice(steps[1:-1]) - 1


@pytest.mark.acceptance
@pytest.mark.parametrize("after", [2, 1])
@pytest.mark.parametrize("place", PLACES)
def test_300_steps_on_emoji_are_the_same_when_two_workers_are_killed(emoji: Reference, place: str, after: int) -> None:
    name = f"{place.replace(' ', '-')}-{after}"
    evaluating = PLACES[place] is while_evaluating
    step = evaluated_next(emoji) if evaluating else random.randint(30, 270)
    last = killed(emoji, name, PLACES[place], after=step, workers=2)
    assert not evaluating or last == step
    print(f"\nkilled {place}, after step {last}")
    assert_equal(resumed(emoji, name, f"cluster.workers={after}"), emoji[1])


@pytest.mark.acceptance
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3)])
def test_300_steps_on_emoji_are_the_same_when_one_process_is_killed(emoji: Reference, before: int, after: int) -> None:
    name = f"killed-{before}-{after}"
    killed(emoji, name, PLACES["in the step"], after=random.randint(30, 270), workers=before)
    assert_equal(resumed(emoji, name, f"cluster.workers={after}"), emoji[1])


@pytest.mark.acceptance
@pytest.mark.parametrize("local", [True, False])
def test_300_steps_on_emoji_are_the_same_when_one_worker_is_killed_and_replaced(
    emoji: Reference, emoji_shards: Path, local: bool
) -> None:
    name = f"worker-{'local' if local else 'ray'}"
    run, step = folder_of(emoji, name), random.randint(30, 270)
    driver = start(emoji[0], name, "cluster.workers=2", local=local)
    wait_for(lambda: Watched(driver, run).logged() >= step, driver)
    os.kill(random.choice(ranks(driver) if local else readers(emoji_shards / "train")), signal.SIGKILL)
    assert_equal(finish(driver), emoji[1])
    print(f"\na worker killed after step {step}: no new step for {standstill_s(run):.0f} s")
    launches = [row["launch"] for row in read_lines(run / "attempts.jsonl")]
    assert len(launches) == 2
    assert len(set(launches)) == 1, "the driver went on by itself"


@pytest.mark.acceptance
@pytest.mark.parametrize("local", [True, False])
def test_300_steps_on_emoji_are_the_same_when_the_driver_is_killed_and_rerun(
    emoji: Reference, emoji_shards: Path, local: bool
) -> None:
    name = f"driver-{'local' if local else 'ray'}"
    run, step = folder_of(emoji, name), random.randint(30, 270)
    driver = start(emoji[0], name, "cluster.workers=2", local=local)
    wait_for(lambda: Watched(driver, run).logged() >= step, driver)
    kill_alone(driver, ranks(driver) if local else readers(emoji_shards / "train"))
    assert_equal(resumed(emoji, name, "cluster.workers=2", local=local), emoji[1])
