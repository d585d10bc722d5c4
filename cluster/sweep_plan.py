"""What a sweep will do: its trials with their configs, all known and checked before the first one starts."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.check import Facts, check, number_of_steps, open_training
from cluster.paths import absolute
from cluster.runfolder import refuse_changes, write_atomically
from cluster.store import experiment_name, tracking_uri
from configs.evaluation import require_ranking
from configs.load import load_config, parse_config, read_settings
from configs.plain import shorten
from configs.schema import RunConfig
from configs.space import Point, Space, parse_space
from pipelines.stream import units_per_epoch

VERSION = 1
DECIDED_BY_SWEEPS = ("seed", "data", "encoder", "loss", "optim", "train")
CHECKING_S = 12.0  # for values that only a full check can refuse; a trial is checked when it starts, too
REDUCTION = 3  # of ASHA: a third goes on from a rung to the next


@dataclass(frozen=True, slots=True)
class Wish:
    """The command line."""

    space: Path
    overrides: Sequence[str] = ()
    name: str | None = None
    trials: int | None = None
    metric: str | None = None
    seed: int = 0
    asha: bool = True
    grace_steps: int | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep; `config` has absolute paths, `number` counts from 1."""

    number: int
    point: Point
    config: RunConfig
    steps: int

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def run(self) -> Path:
        return Path(self.config.cluster.storage) / self.name


@dataclass(frozen=True, slots=True)
class Plan:
    """A sweep. grace_steps: before it no trial is stopped; None without early stopping."""

    name: str
    folder: Path
    config: RunConfig
    space: Space
    metric: str
    seed: int
    grace_steps: int | None
    trials: tuple[Trial, ...]

    @property
    def cpus(self) -> float:
        """Of one trial, whose workers are on one node."""
        return self.config.cluster.most_workers * self.config.cluster.cpus_per_worker

    @property
    def gpus(self) -> float:
        workers, each = self.config.cluster.most_workers, self.config.cluster.gpus_per_worker
        return each if workers == 1 else workers * math.ceil(each)  # several ranks need a GPU each

    @property
    def steps(self) -> int:
        """Of the longest trial."""
        return max(trial.steps for trial in self.trials)

    def configured(self, point: Point, name: str) -> RunConfig:
        """The whole config of a point, as a run of its own beside the sweep."""
        return _with(self.config, {**point, "name": name}, where=name)


def make(config: Path, wish: Wish) -> Plan:
    """Read, check and draw everything. Raises ValueError that names the setting and the remedy."""
    base = absolute(load_config(config, wish.overrides))
    named = base.tracking.model_copy(update={"experiment": experiment_name(base.tracking)})
    base = base.model_copy(update={"tracking": named})
    where = str(wish.space)
    space = parse_space(read_settings(wish.space), where=where)
    count = space.num_trials(wish.trials)
    metric = _metric(base, wish.metric)
    name = wish.name or f"{base.name}-sweep"
    folder = Path(base.cluster.storage) / name
    _with(base, {"name": f"{name}-{count:03d}"}, where="--name")
    for setting in space.settings:
        for value in setting.ends():
            _with(base, {setting.key: value}, where=f"{where}: {setting.key} {shorten(value)}")
        _refuse_undecidable(setting.key, where)
    facts = check(base)
    _try_ends(base, space, where)
    points = space.draw(count, wish.seed, lambda point: _against(base, point))
    trials = tuple(_trial(base, folder, number, point, facts) for number, point in enumerate(points, 1))
    plan = Plan(name, folder, base, space, metric, wish.seed, None, trials)
    grace = _grace(plan, wish.grace_steps) if wish.asha else None
    return Plan(name, folder, base, space, metric, wish.seed, grace, trials)


def claim(plan: Plan) -> None:
    """Write RUNS/NAME/plan.json, or find there what this sweep was. Raises ValueError when it was another one."""
    file = plan.folder / "plan.json"
    if not file.exists() and plan.folder.exists() and any(plan.folder.iterdir()):
        raise ValueError(f"{plan.folder} is there already and holds no sweep; choose another --name")
    decides = json.loads(json.dumps(_decides(plan)))
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before.get("version") != VERSION:
            raise ValueError(f"{file} was written by another version of nearfar; choose another --name")
        try:
            refuse_changes(f"sweep {plan.name!r} in {plan.folder}", before["decides"], decides)
        except ValueError as error:
            raise ValueError(f"{error}\nchoose another --name for a new sweep") from error
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"version": VERSION, "decides": decides, "trials": len(plan.trials)}, indent=1) + "\n")


def _decides(plan: Plan) -> dict[str, Any]:
    """All that the trials and their order follow from, but for how many there are."""
    config = plan.config
    return {
        "config": config.identity(),
        "data": {"train": [source.path for source in config.data.train], "eval": config.data.eval},
        "evaluate": config.evaluate.model_dump(mode="json"),
        "space": plan.space.as_dict(),
        "metric": plan.metric,
        "seed": plan.seed,
        "grace_steps": plan.grace_steps,
    }


def _with(config: RunConfig, settings: Mapping[str, Any], *, where: str) -> RunConfig:
    tree = config.model_dump(mode="json", by_alias=True)
    try:
        return parse_config(tree, [f"{key}={json.dumps(value)}" for key, value in settings.items()], where=where)
    except ValueError as error:
        message = str(error) if str(error).startswith(where) else f"{where}: {error}"
        raise ValueError(message.replace("--set ", "")) from error


def _against(config: RunConfig, point: Point) -> str | None:
    """Why the settings of a point do not go together, or None."""
    try:
        _with(config, point, where=", ".join(f"{key} {shorten(value)}" for key, value in point.items()))
    except ValueError as error:
        return str(error)
    return None


def _metric(config: RunConfig, asked: str | None) -> str:
    if config.data.eval is None:
        raise ValueError("data.eval: not given, so there is nothing to compare trials by; name a set to evaluate on")
    metric = require_ranking(asked or config.tracking.promote.metric)
    measured = config.metrics(at_end=False)
    if metric not in measured:
        raise ValueError(
            f"--metric {metric}: not among what every evaluation measures ({', '.join(measured)}); add it to evaluate.metrics"
        )
    return metric


def _refuse_undecidable(key: str, where: str) -> None:
    if key.partition(".")[0] not in DECIDED_BY_SWEEPS:
        raise ValueError(
            f"{where}: {key} decides nothing of what a trial computes, or how it is measured; a sweep takes settings of "
            f"{', '.join(DECIDED_BY_SWEEPS)}"
        )
    if key in ("data", "data.eval"):
        raise ValueError(f"{where}: {key}: trials are compared on one and the same data.eval; leave it to CONFIG")


def _try_ends(config: RunConfig, space: Space, where: str) -> None:
    """Options of encoder, loss and optimizer are known only to what they are for."""
    until = time.monotonic() + CHECKING_S
    for setting in space.settings:
        for value in setting.ends() if setting.key != "seed" else ():
            if time.monotonic() > until:
                return
            try:
                check(_with(config, {setting.key: value}, where=where))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{where}: {setting.key} {shorten(value)}: {error}") from error


def _trial(config: RunConfig, folder: Path, number: int, point: Point, facts: Facts) -> Trial:
    """A run in the sweep's folder, told to the same MLflow. Trials are not registered: that is for the best one's config."""
    settings: dict[str, Any] = {**point, "name": f"{folder.name}-{number:03d}", "cluster.storage": str(folder)}
    settings["tracking.register"] = None
    if config.tracking.uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        settings["tracking.uri"] = tracking_uri(config.tracking, folder.parent)
    made = absolute(_with(config, settings, where=settings["name"]))
    changed = any(key.partition(".")[0] in ("data", "train") for key in point)
    return Trial(number, point, made, _steps(made) if changed else facts.steps)


def _steps(config: RunConfig) -> int:
    if config.train.steps is not None:
        return config.train.steps
    return number_of_steps(config, units_per_epoch(open_training(config), config.data, None))


def _grace(plan: Plan, asked: int | None) -> int:
    """A ninth of the run, and at least one evaluation, unless another number is `asked` for."""
    if asked is not None and asked >= plan.steps:
        raise ValueError(f"--grace-steps {asked} leaves nothing of {plan.steps} steps; lower it, or give --no-asha")
    usual = max(plan.config.train.evaluate_every, plan.steps // REDUCTION**2)
    return min(asked or usual, plan.steps)
