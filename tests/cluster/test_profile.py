"""Where the time of a step goes: real ranks, real traces."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import context, profile_table
from cluster.job import Job
from cluster.paths import absolute
from cluster.profile_table import OTHER, RankTimes, StepTimes
from cluster.profiling import _Clock
from cluster.runfolder import RunFolder
from cluster.worker import worker_main
from configs.load import load_config
from pipelines import growth
from pipelines.mixture import open_sources
from tests.conftest import Answer
from tests.integration.test_train import train
from tests.runs import curve
from trainer import ranges

STEPS = 4
QUIET = ("--set", "finish.report=false", "--set", "finish.onnx=false", "--set", "data.check_duplicates=false")
SHORT = ("--set", "train.steps=10", "--set", "train.evaluate_every=1000", "--set", "tracking.enabled=false")


def ranges_of(trace: Path) -> Counter[str]:
    """Milliseconds in all ranges of each name in a Chrome trace."""
    found: Counter[str] = Counter()
    with gzip.open(trace, "rt") as file:
        for event in json.load(file)["traceEvents"]:
            if event.get("cat") == "user_annotation":
                found[event["name"]] += event["dur"] / 1000
    return found


def assert_whole(run: Path, world: int) -> None:
    """Parts that add up, and that the traces confirm."""
    folder = run / "profile"
    table = json.loads((folder / "steps.json").read_text())
    assert (table["steps"], table["world"], len(table["ranks"])) == (STEPS, world, world)
    assert list(table["parts"]) == [*ranges.PARTS, OTHER]
    assert sum(part["share"] for part in table["parts"].values()) == pytest.approx(1)
    for rank in table["ranks"]:
        assert sum(rank["parts"].values()) == pytest.approx(rank["step"])
        assert all(ms >= 0 for ms in rank["parts"].values()), rank
        seen = ranges_of(folder / rank["trace"])
        between = (ranges.GATHER, ranges.REDUCE)
        for part in ranges.PARTS:
            assert (seen[part] > 0) is (world > 1 or part not in between), part
        for part in (ranges.FORWARD, ranges.PREPARE, ranges.DATA):  # no other part lies in them
            assert 0 < rank["parts"][part] <= 1.001 * seen[part] / STEPS  # the trace's ranges begin before and end after
        assert rank["parts"][ranges.FORWARD] > 0.5 * seen[ranges.FORWARD] / STEPS
        assert (rank["parts"][ranges.REDUCE] > 0) is (world > 1)


@pytest.mark.acceptance
def test_two_local_ranks_say_where_the_time_of_a_step_goes(nearfar: Callable[..., Answer], config_file: Path) -> None:
    answer = nearfar("train", config_file, "--local", "--profile", STEPS, "--json", *SHORT, *QUIET)
    assert answer.code == 0, answer.err
    assert_whole(Path(json.loads(answer.out)["run"]), 2)
    assert "steps 6 to 9, cpu, 2 workers: " in answer.err
    assert "nodes: " in answer.err


def test_one_process_says_where_the_time_of_a_step_goes(config_file: Path) -> None:
    config = absolute(load_config(config_file, ["cluster.workers=1", "data.eval=null"]))
    run = RunFolder.of(config)
    run.claim(config)
    manifest = open_sources(config.data.train, None)
    job = Job(config, run.path, steps=10, histories=growth.begin(manifest), launch_id="once", profile=STEPS)
    worker_main(context.single(gpu=False), job)
    assert_whole(run.path, 1)


@pytest.mark.acceptance
@pytest.mark.parametrize("mode", ["train.reproducible=false", "train.reproducible=true"])
def test_a_profile_changes_nothing(config_file: Path, mode: str) -> None:
    settings = (*SHORT, "--set", "train.precision=fp32", "--set", "train.micro_batch=4", "--set", mode, "--local")
    plain = train(config_file, "plain", *settings)
    watched = train(config_file, "watched", *settings, "--profile", str(STEPS))
    assert curve(plain["run"]) == curve(watched["run"])
    assert plain["weights"] == watched["weights"]
    assert_whole(Path(watched["run"]), 2)


@pytest.mark.acceptance
def test_ray_workers_on_a_named_interface_profile_too(config_file: Path) -> None:
    placed = ("--set", "cluster.interface=lo", "--set", "cluster.placement=spread")
    found = train(config_file, "ray", *SHORT, *placed, "--profile", str(STEPS))
    assert_whole(Path(found["run"]), 2)


def test_more_steps_than_there_are_cannot_be_profiled(nearfar: Callable[..., Answer], config_file: Path) -> None:
    answer = nearfar("train", config_file, "--local", "--profile", 6, *SHORT)
    assert answer.code == 2
    assert "--profile 6: it begins after 5 steps, and the run has 10" in answer.err


def test_a_part_counts_no_part_inside_it() -> None:
    clock = _Clock(torch.device("cpu"))
    with ranges.watched(clock.part), ranges.part(ranges.LOSS):
        time.sleep(0.01)
        with ranges.part(ranges.GATHER):
            time.sleep(0.05)
        with ranges.part(ranges.GATHER):
            time.sleep(0.05)
    assert clock.spent[ranges.GATHER] >= 0.1
    assert 0.01 <= clock.spent[ranges.LOSS] < clock.spent[ranges.GATHER]
    before = dict(clock.spent)
    with ranges.part(ranges.LOSS):
        time.sleep(0.001)
    assert clock.spent == before


def test_the_table_names_the_slowest_rank() -> None:
    def rank(number: int, wait: float) -> RankTimes:
        return RankTimes(number, f"node-{number}", "", 10.0, {ranges.DATA: wait, OTHER: 10.0 - wait})

    times = StepTimes(6, 4, "cpu", [rank(0, 1.0), rank(1, 4.0)])
    found: dict[str, Any] = times.as_dict()["parts"][ranges.DATA]
    assert found == {"ms": 2.5, "share": 0.25, "slowest_ms": 4.0, "slowest_rank": 1}
    row = next(line for line in profile_table.describe(times).splitlines() if line.startswith(ranges.DATA))
    assert row.split() == ["data", "wait", "2.50", "25.0", "%", "4.00", "ms,", "rank", "1", "on", "node-1"]
