"""Without `train.reproducible`: float64 agrees to 1e-8 wherever a run runs, float32 in how well the encoder finds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import EMOJI, Reference
from tests.kills import in_the_step, kill
from tests.runs import curve, start, train

pytestmark = pytest.mark.acceptance
TOLERANCE = 1e-8  # relative, over all steps
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def float64(emoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """100 steps on emoji in one process with one thread."""
    folder = tmp_path_factory.mktemp("float64")
    config = folder / "run.yaml"
    config.write_text(EMOJI.format(shards=emoji_shards, steps=100, mode="precision: fp64", storage=folder / "runs"))
    return config, train(config, "one", "data.threads=1")


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every step exactly once, and all that was logged of it within TOLERANCE."""
    rows = curve(expected["run"])
    assert [row["step"] for row in rows] == list(range(expected["steps"] + 1))
    worst = 0.0
    for row, other in zip(rows, curve(found["run"]), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=TOLERANCE), (row["step"], name)
            worst = max(worst, abs(other[name] / value - 1) if value else 0.0)
    print(f"\n{found['name']}: {expected['steps']} steps, relative difference at most {worst:.1e}")


SCHEDULES: dict[str, dict[str, Any]] = {
    "one": {"settings": ["data.threads=3"], "threads": 3},
    "two": {"settings": ["cluster.workers=2", "data.threads=1"]},
    "two-threads": {"settings": ["cluster.workers=2", "data.threads=3"], "threads": 3},
    "four": {"settings": ["cluster.workers=4", "data.threads=3"]},
    "ray": {"settings": ["cluster.workers=2"], "local": False},
    "ray-four": {"settings": ["cluster.workers=4"], "local": False},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_float64_agrees_on_any_schedule(float64: Reference, name: str) -> None:
    how = dict(SCHEDULES[name])
    assert_close(train(float64[0], f"schedule-{name}", *how.pop("settings"), **how), float64[1])


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 4)])
def test_float64_agrees_when_killed_and_resumed(float64: Reference, before: int, after: int) -> None:
    config, expected = float64
    name = f"killed-{before}-{after}"
    run = Path(expected["run"]).parent / name
    kill(start(config, name, f"cluster.workers={before}"), run, in_the_step, after=40)
    assert_close(train(config, name, f"cluster.workers={after}", resume=True), expected)


def test_float32_finds_as_well_on_two_workers_as_on_one(emoji_shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(EMOJI.format(shards=emoji_shards, steps=300, mode="precision: fp32", storage=tmp_path / "runs"))
    recall: dict[int, list[float]] = {}
    for workers in (1, 2):
        runs = [train(config, f"w{workers}-s{seed}", f"cluster.workers={workers}", f"seed={seed}") for seed in SEEDS]
        recall[workers] = [run["metrics"]["recall_at_1"] for run in runs]
    one, two = recall.values()
    error = ((statistics.variance(one) + statistics.variance(two)) / len(SEEDS)) ** 0.5
    difference = statistics.mean(two) - statistics.mean(one)
    print(f"\nrecall@1 of 1 worker {one}, of 2 workers {two}: difference {difference:+.4f}, standard error {error:.4f}")
    assert abs(difference) <= max(0.01, 2 * error)
