"""A sweep's plan: its trials as configs, and what is refused before Ray starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_config
from tests.conftest import Answer

SEEDS = "seed: {randint: [0, 9]}\n"
SPACE = "optim.lr: {loguniform: [1e-4, 1e-2]}\nencoder.dim: [8, 16]\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def test_a_trial_is_the_config_with_its_settings_in_the_folder_of_the_sweep(config_file: Path, tmp_path: Path) -> None:
    from cluster.sweep_plan import Wish, make

    plan = make(config_file, Wish(write(tmp_path, SPACE), trials=3, overrides=("tracking.register=digits",)))
    base = load_config(config_file)
    assert plan.metric == "recall_at_1"
    assert plan.grace_steps == 25  # no evaluation before
    assert (plan.cpus, plan.gpus) == (2, 0)
    for trial in plan.trials:
        assert trial.run == tmp_path / "runs/small-sweep" / f"small-sweep-{trial.number:03d}"
        assert (trial.config.optim.lr, trial.config.encoder.options["dim"]) == (
            trial.point["optim.lr"],
            trial.point["encoder.dim"],
        )
        assert trial.config.loss == base.loss
        assert trial.config.tracking.register_as is None
        assert trial.config.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
        best = plan.configured(trial.point, "best")
        assert best.identity() == trial.config.identity()
        assert (best.cluster.storage, best.tracking.register_as) == (str(tmp_path / "runs"), "digits")


@pytest.mark.parametrize(
    ("space", "arguments", "message"),
    [
        ("{}", (), "decides nothing"),
        ("optm.lr: [1, 2]", (), "did you mean 'optim'"),
        ("encoder.dimm: [8, 16]", (), "encoder.dimm: encoder 'convnet' has no such option; did you mean 'dim'?"),
        ("optim.lr: {uniform: [-1, 1]}", (), "optim.lr -1:"),
        ("optim.lr: {uniform: [2, 1]}", (), "low must be below high"),
        ("cluster.workers: [1, 2]", (), "cluster.workers decides nothing of what a trial computes"),
        ("data.eval: [a, b]", (), "data.eval: trials are compared on one and the same"),
        (SPACE, ("--metric", "roc_auc"), "--metric roc_auc: not among what every evaluation measures"),
        (SPACE, ("--metric", "recal_at_1"), "is no metric"),
        (SPACE, ("--set", "data.eval=null"), "data.eval: not given"),
        (SEEDS, ("--grace-steps", "50"), "--grace-steps 50 leaves nothing of 50 steps"),
        (SPACE, ("--name", "a/b"), "--name"),
        ("encoder.dim: [8, 16]", ("--trials", "3"), "the space has 2 different points"),
    ],
)
def test_mistakes_are_told_before_ray_starts(
    nearfar: Callable[..., Answer], config_file: Path, tmp_path: Path, space: str, arguments: tuple[str, ...], message: str
) -> None:
    before = time.monotonic()
    said = nearfar("sweep", config_file, "--space", write(tmp_path, space), *arguments)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert time.monotonic() - before < 30
    assert not (tmp_path / "runs/small-sweep").exists()


def test_a_sweep_of_another_space_is_refused_with_the_difference(config_file: Path, tmp_path: Path) -> None:
    from cluster.sweep_plan import Wish, claim, make

    claim(make(config_file, Wish(write(tmp_path, SEEDS), trials=2)))
    claim(make(config_file, Wish(write(tmp_path, SEEDS), trials=4)))  # more of the same
    with pytest.raises(ValueError, match=r"space\.seed\.randint: \[0, 9\] -> \[1, 9\]"):
        claim(make(config_file, Wish(write(tmp_path, SEEDS.replace("0,", "1,")))))
    with pytest.raises(ValueError, match=r"config\.optim\.weight_decay"):
        claim(make(config_file, Wish(write(tmp_path, SEEDS), overrides=("optim.weight_decay=0.5",))))
    (tmp_path / "runs/taken").mkdir()
    (tmp_path / "runs/taken/config.yaml").write_text("name: taken")
    with pytest.raises(ValueError, match=r"taken is there already and holds no sweep; choose another --name"):
        claim(make(config_file, Wish(write(tmp_path, SEEDS), name="taken")))


def test_halving_is_asynchronous_successive_halving_and_leaves_word(tmp_path: Path) -> None:
    """Against the paper's rule, of Ray's version: at a rung a trial goes on unless it is below the top third so far."""
    from cluster.sweep_state import noted_end
    from cluster.sweep_tune import Halving

    values = [0.5, 0.7, 0.4, 0.9, 0.65, 0.71, 0.2]
    runs = {f"t{i}": tmp_path / f"t{i}" for i in range(len(values))}
    asha = Halving(runs, grace_steps=10, steps=90)
    seen: list[float] = []
    for i, value in enumerate(values):
        asha.remember(f"t{i}", 5, 0.0, last=True)  # before the first rung nothing is decided
        asha.remember(f"t{i}", 10, value, last=True)
        ordered = sorted(seen)
        at = (len(ordered) - 1) * 2 / 3
        cut = (
            -math.inf
            if not ordered
            else ordered[int(at)] + (at % 1) * (ordered[min(int(at) + 1, len(ordered) - 1)] - ordered[int(at)])
        )
        assert bool(noted_end(runs[f"t{i}"])) == (value < cut), (i, value, cut)
        seen.append(value)
    asha.remember("t1", 30, 0.1, last=False)
    asha.remember("t3", 30, 0.0, last=False)  # it went on all the same, so the earlier driver had decided otherwise
    assert not noted_end(runs["t3"])
