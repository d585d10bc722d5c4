"""The space of a sweep: what it takes, what it refuses, and that its points follow from the seed and the number alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from configs.load import read_settings
from configs.space import Point, Space, parse_space

SPACE: dict[str, Any] = {
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "loss.temperature": {"uniform": [0.03, 0.2]},
    "encoder.dim": {"choice": [64, 128]},
    "data.batch": [128, 256],
    "train.ema": {"quniform": [0.0, 0.9, 0.3]},
    "seed": {"randint": [3, 5]},
}


def anything(_point: Point) -> str | None:
    return None


def space(**more: Any) -> Space:
    return parse_space({**SPACE, **more}, where="space.yaml")


def test_every_kind_draws_what_it_says() -> None:
    points = space().draw(300, 0, anything)
    assert len({str(point) for point in points}) == 300
    rates = sorted(math.log10(point["optim.lr"]) for point in points)
    assert -4 <= rates[0] < -3.9
    assert -2.1 < rates[-1] <= -2
    assert rates[150] == pytest.approx(-3, abs=0.15)  # the median lies in the middle of the logarithms
    assert all(0.03 <= point["loss.temperature"] <= 0.2 for point in points)
    assert {point["encoder.dim"] for point in points} == {64, 128}
    assert {point["data.batch"] for point in points} == {128, 256}
    assert {point["train.ema"] for point in points} == {0.0, 0.3, 0.6, 0.9}
    assert {point["seed"] for point in points} == {3, 4, 5}


def test_points_follow_from_the_seed_and_the_number_alone() -> None:
    points = space().draw(20, 7, anything)
    assert space().draw(5, 7, anything) == points[:5]
    assert space().draw(20, 8, anything) != points
    more = space(**{"optim.weight_decay": {"uniform": [0.0, 0.1]}}).draw(20, 7, anything)
    assert [{k: point[k] for k in SPACE} for point in more] == points


def test_a_grid_is_tried_in_full_beside_what_is_drawn() -> None:
    found = parse_space({"a": {"grid": [1, 2, 3]}, "b": {"grid": ["x", "y"]}, "c": {"uniform": [0, 1]}}, where="s")
    assert found.num_trials(None) == 6
    points = found.draw(12, 0, anything)
    cells = [(point["a"], point["b"]) for point in points]
    assert sorted(cells) == sorted([(a, b) for a in (1, 2, 3) for b in "xy"] * 2)
    assert len({point["c"] for point in points}) == 12


def test_a_small_space_gives_each_of_its_points_once() -> None:
    found = parse_space({"a": [1, 2], "b": {"randint": [1, 3]}}, where="s")
    assert sorted((p["a"], p["b"]) for p in found.draw(6, 0, anything)) == [(a, b) for a in (1, 2) for b in (1, 2, 3)]
    assert found.num_trials(None) == 6
    with pytest.raises(ValueError, match=r"--trials 7: the space has 6 different points"):
        found.num_trials(7)


def test_what_cannot_be_trained_is_drawn_again() -> None:
    found = parse_space({"a": [1, 2], "b": {"randint": [1, 3]}}, where="s")
    points = found.draw(3, 0, lambda point: "a is 1" if point["a"] == 1 else None)
    assert sorted(point["b"] for point in points) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"only 3 of 4 points can be trained: a is 1"):
        found.draw(4, 0, lambda point: "a is 1" if point["a"] == 1 else None)


def test_ends_are_what_all_values_lie_between() -> None:
    assert {one.key: one.ends() for one in space().settings} == {
        "optim.lr": (1e-4, 1e-2),
        "loss.temperature": (0.03, 0.2),
        "encoder.dim": (64, 128),
        "data.batch": (128, 256),
        "train.ema": (0.0, 0.9),
        "seed": (3, 5),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "decides nothing"),
        ("optim.lr: 0.1", "optim.lr: 0.1 decides nothing; give a list of values"),
        ("optim.lr: []", "optim.lr: an empty choice"),
        ("optim.lr: {loguniform: [1e-2, 1e-4]}", "low must be below high; write [0.0001, 0.01]"),
        ("optim.lr: {uniform: [1, 1]}", "low must be below high; write two different numbers"),
        ("optim.lr: {loguniform: [0, 1]}", "low must be above 0"),
        ("optim.lr: {uniform: [1]}", "uniform takes [low, high]; got [1]"),
        ("optim.lr: {uniform: [.nan, 1]}", "uniform takes [low, high]"),
        ("optim.lr: {uniform: [true, 2]}", "uniform takes [low, high]"),
        ("seed: {randint: [1.5, 3]}", "randint takes [low, high], whole numbers"),
        ("seed: {quniform: [1, 3, 4]}", "the step must be above 0 and at most 2"),
        ("optim.lr: {logunifrom: [1, 2]}", "no kind 'logunifrom'; did you mean 'loguniform'?"),
        ("optim: {lr: {uniform: [1, 2]}}", "nested settings with a dot: optim.NAME"),
        ("encoder.dim: [64, 64]", "has a value twice"),
        ("encoder: [{name: convnet}]\nencoder.dim: [1]", "encoder and encoder.dim both decide encoder.dim"),
    ],
)
def test_a_mistake_is_told_with_its_setting(text: str, message: str, tmp_path: Any) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"space\.yaml: ") as told:
        parse_space(read_settings(file), where="space.yaml")
    assert message in str(told.value)
