"""The shipped recipes: each builds, says what it is, and makes its data with commands that there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer.main

from cluster.cli import app
from cluster.recipes import commands, is_done, make_data, names, product_of, text_of, title
from configs.load import load_config
from tests.conftest import Answer
from tests.recipes import table
from tests.recipes.plan import EMOJI, FASHION, HEADLINE, OWN_MACHINE, PLANNED, TEXT
from trainer.encoders import build_encoder
from trainer.objective import build_objective

Nearfar = Callable[..., Answer]
FIRST_LOOK = ("digits", "emoji")  # of `make demo`


@pytest.mark.parametrize("name", names())
def test_a_recipe_builds_its_parts_and_says_what_it_is(name: str) -> None:
    config = load_config(name)
    assert config.name == (name if name not in OWN_MACHINE else config.name)
    assert 20 < len(title(name)) < 128
    build_objective(list(config.loss), dim=64, groups=torch.arange(10))  # type: ignore[arg-type]
    if name not in OWN_MACHINE and config.encoder.anchor is None:
        encoder = build_encoder(config.encoder.model_copy(update={"init": None}), config.data.image_size)
        raw = getattr(encoder, "raw", False)
        assert all(bool(part.options.get("normalize", True)) is not raw for part in config.loss)
    assert "ource" in text_of(name) or name in FIRST_LOOK or name.startswith(("finetune", "frozen-text-"))


@pytest.mark.parametrize("name", names())
def test_the_commands_in_a_recipes_head_are_understood_and_make_its_data(name: str) -> None:
    root = typer.main.get_command(app)
    made = set()
    for command in commands(name):
        program = root.commands[command[0]]  # type: ignore[attr-defined]
        program.make_context(command[0], list(command[1:]))  # parses every option, runs nothing
        if command[0] == "pack":
            assert command[1] in made or any(Path(command[1]).is_relative_to(one) for one in made)
        made.add(str(product_of(command)))
    config = load_config(name)
    if name in OWN_MACHINE:
        assert not made
        return
    for place in (config.data.train[0].path, config.data.eval):
        assert place is not None
        assert any(Path(place).is_relative_to(one) for one in made)


def test_every_recipe_is_measured_but_those_for_other_machines() -> None:
    measured = {entry.recipe for entry in PLANNED}
    assert measured | set(OWN_MACHINE) | set(FIRST_LOOK) == set(names())
    assert set(HEADLINE) <= {*FASHION, *EMOJI, *TEXT}
    runs = [run for entry in PLANNED for run, _ in entry.runs()]
    assert len(set(runs)) == len(runs)


def test_a_recipe_is_trained_by_its_name_on_the_data_that_it_makes(
    nearfar: Nearfar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data("dimensionality-reduction", tmp_path)
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar"))
    make_data("dimensionality-reduction", tmp_path)  # all is there
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")) == before
    short = ("steps=4", "checkpoint_every=4", "evaluate_every=4", "log_every=2")
    settings = [*(f"train.{one}" for one in short), "optim.warmup_steps=1", "finish.onnx=false", "finish.report=false"]
    flags = [part for one in settings for part in ("--set", one)]
    answer = nearfar("train", "dimensionality-reduction", "--local", *flags)
    assert answer.code == 0, answer.err
    run = tmp_path / "runs" / "dimensionality-reduction"
    found = table.read(run)
    assert found is not None
    assert found["seconds"] > 0
    assert is_done(run / "result.json")
    (run / "result.json").write_text(json.dumps({**found, "status": "KILLED"}))
    assert not is_done(run / "result.json")
    assert table.read(run) is None
    (run / "result.json").write_text(json.dumps(found))
    text = table.table(tmp_path / "runs")
    assert f"| `dimensionality-reduction` | {found['before']['recall_at_1']:.3f} |" in text
    assert json.loads((run / "result.json").read_text())["steps"] == 4


def test_an_unknown_recipe_is_refused(nearfar: Nearfar) -> None:
    answer = nearfar("recipes", "batch-hart")
    assert answer.code == 2
    assert "did you mean 'batch-hard'" in answer.err
    assert "--data: of which recipe" in nearfar("recipes", "--data").err
