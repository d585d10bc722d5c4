"""`train.reproducible` from the command line: curves and weights that can be compared by `cmp`, wherever a run runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from tests.integration.conftest import Reference
from tests.runs import assert_equal, train


def test_two_processes_with_more_threads_give_the_very_numbers_of_one(small: Reference) -> None:
    config, one = small
    two = train(config, "two", "cluster.workers=2", "data.threads=3", threads=3)
    assert one["steps"] == 30
    assert_equal(two, one)
    hashes = list(read_lines(Path(one["run"]) / "hashes.jsonl"))
    assert [row["step"] for row in hashes] == [6, 12, 18, 24, 30]
    assert hashes == list(read_lines(Path(two["run"]) / "hashes.jsonl"))
    assert hashes[-1]["weights"] == one["weights"]
    assert f"step 30: weights {one['weights']}" in one["stderr"]


SCHEDULES: dict[str, dict[str, Any]] = {
    "two": {"settings": ["cluster.workers=2", "data.threads=3"], "threads": 3},
    "four": {"settings": ["cluster.workers=4"]},
    "ray": {"settings": ["cluster.workers=2"], "local": False},
}


@pytest.mark.acceptance
@pytest.mark.parametrize("name", SCHEDULES)
def test_300_steps_on_emoji_are_the_same_anywhere(emoji: Reference, name: str) -> None:
    how = dict(SCHEDULES[name])
    assert_equal(train(emoji[0], name, *how.pop("settings"), **how), emoji[1])
