"""Stopped by Ctrl-C and resumed, on the GPU and from one kind of device to the other: the curve of a run left alone."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.card import needs_card
from tests.gpu.conftest import ON_CARD
from tests.gpu.test_train import REPRODUCIBLE, assert_close
from tests.kills import Watched
from tests.runs import assert_equal, start, train, wait_for

pytestmark = needs_card
STEPS = ["train.steps=200", "train.evaluate_every=100"]
DEVICES = {"card": [ON_CARD], "cpu": ["cluster.gpus_per_worker=0"]}


def stopped(config: Path, name: str, *settings: str) -> None:
    """Train, and ask the run to stop once step 20 is logged."""
    driver = start(config, name, *settings)
    watched = Watched(driver, config.parent / "runs" / name)
    wait_for(lambda: watched.logged() >= 20, driver)
    driver.send_signal(signal.SIGINT)
    _, told = driver.communicate(timeout=120)
    assert driver.returncode == 130, told
    assert 20 <= watched.logged() < 200


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, Any]:
    return train(config, "whole", ON_CARD, *STEPS)


@pytest.mark.parametrize(("before", "after"), [("card", "card"), ("card", "cpu"), ("cpu", "card")])
def test_the_curve_goes_on(config: Path, whole: dict[str, Any], before: str, after: str) -> None:
    name = f"{before}-{after}"
    stopped(config, name, *STEPS, *DEVICES[before])
    assert_close(train(config, name, *STEPS, *DEVICES[after], resume=True), whole, within=1e-8)


def test_a_reproducible_run_goes_on_to_the_same_bits(config: Path) -> None:
    settings = [*STEPS, ON_CARD, *REPRODUCIBLE, "train.precision=fp32", "train.channels_last=true"]
    stopped(config, "halved", *settings)
    assert_equal(train(config, "halved", *settings, resume=True), train(config, "unhalved", *settings))
