"""`nearfar demo`: real images to a registered encoder and a report, in minutes."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import tempfile
import uuid
from pathlib import Path
from typing import Any

import configs
from cluster import launch
from cluster.job import Job
from cluster.progress import bar, say
from cluster.run import train
from cluster.runfolder import RunFolder, read_lines
from configs.load import load_config
from configs.plain import suggest
from configs.registry import resolve
from configs.schema import RunConfig
from pipelines.growth import begin
from pipelines.mixture import open_sources

WARM, TIMED = 4, 10  # steps before and while the clock runs
# What is held out. Ten digits are too few classes to learn from seven what tells the other three apart.
SPLIT = {"emoji": "class", "digits": "record"}
MAX_SIDE = 64  # of the packed images; some are drawn with 256


def run_demo(data: str, out: Path, *, workers: int, minutes: float) -> str:
    """Fetch, pack by class, train for about `minutes`, evaluate, register, report; returns what to tell the user.

    Images and shards that are there already are used again. Raises ValueError for an unknown data set.
    """
    if data not in SPLIT:
        raise ValueError(f"no demo with {data!r}; {suggest(data, SPLIT)}")
    shards = _shards(data, out)
    config = _config(data, out, shards, workers)
    steps = max(1, int(minutes * 60 / _seconds_a_step(config)))
    settings = {"steps": steps, "evaluate_every": max(1, steps // 5), "checkpoint_every": max(1, steps // 5)}
    warmup = min(config.optim.warmup_steps, steps // 4)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update=settings),
            "optim": config.optim.model_copy(update={"warmup_steps": warmup}),
        }
    )
    say(f"{minutes:g} minutes are {steps} steps on this machine")
    return _tell(train(config), out, SPLIT[data])


def _shards(data: str, out: Path) -> Path:
    images, shards = out / "images" / data, out / "shards" / data
    if not (shards / "train" / "manifest.json").exists():
        from pipelines.pack import pack

        if not images.exists():
            with bar(f"fetching {data}") as report:
                resolve("dataset", data)(images, progress=report)
        with bar("packing", "images") as report:
            pack(images, shards, eval_fraction=0.25, split=SPLIT[data], max_side=MAX_SIDE, workers=2, progress=report)
    return shards


def _config(data: str, out: Path, shards: Path, workers: int) -> RunConfig:
    recipe = Path(configs.__file__).parent / "recipes" / f"{data}.yaml"
    name = next(
        n for n in itertools.chain([data], (f"{data}-{i}" for i in itertools.count(2))) if not (out / "runs" / n).exists()
    )
    return load_config(
        recipe,
        [
            f"name={name}",
            f"data.train={json.dumps(str(shards / 'train'))}",
            f"data.eval={json.dumps(str(shards / 'eval'))}",
            f"cluster.workers={workers}",
            f"cluster.storage={json.dumps(str(out / 'runs'))}",
        ],
    )


def _seconds_a_step(config: RunConfig) -> float:
    """The median time of a step of this very config, measured with as many local processes; nothing of it is kept."""
    say("measuring the speed of this machine")
    folder = Path(tempfile.mkdtemp(prefix="nearfar-"))
    short = {"log_every": 1, "steps": WARM + TIMED}
    timed = config.model_copy(
        update={
            "data": config.data.model_copy(update={"eval": None}),
            "train": config.train.model_copy(update=short),
            "cluster": config.cluster.model_copy(update={"storage": str(folder)}),
        }
    )
    run = RunFolder.of(timed)
    try:
        run.claim(timed)
        histories = begin(open_sources(timed.data.train))
        job = Job(config=timed, run=run.path, steps=WARM + TIMED, histories=histories, launch_id=uuid.uuid4().hex[:8])
        launch.run(job, local=True)
        times = [row["time"] for row in read_lines(run.metrics)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return float(statistics.median(b - a for a, b in itertools.pairwise(times[WARM - 1 :])))


def _tell(result: dict[str, Any], out: Path, split: str) -> str:
    before, after = result["before"], result["metrics"]
    seen = "On classes that training never saw" if split == "class" else "On images that training never saw"
    lines = ["", f"{seen}, searching each among all others:"]
    shown = [name for name in ("recall_at_1", "recall_at_5", "recall_at_10", "map_at_r") if name in before]
    lines += [f"  {name.replace('_at_', '@'):10} {before[name]:.3f} -> {after[name]:.3f}" for name in shown]
    lines += ["", f"report  {result['report']}", f"MLflow  nearfar ui {out / 'runs'}"]
    if result["model"] is not None:
        lines.append(f"model   mlflow.pyfunc.load_model({result['model']!r}), tracking URI {result['tracking_uri']}")
    return "\n".join(lines)
