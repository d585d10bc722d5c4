"""What Ray Tune needs to run a sweep's trials: who trains, which is next, which is stopped.

A trial holds a placement group of one bundle with the CPUs and GPUs of all its workers, and in it an actor that starts
`nearfar train --local` as a process of its own (cluster/sweep_trial.py), follows its metrics.jsonl and reports each evaluation.
The other way, Ray Train within Tune, would need a driver and a worker group for every trial (12 to 16 s, 0.5 GB a worker) and
TorchTrainer's storage beside ours; what it adds, trials over several nodes, is for one long run and not for many short ones.
Here a trial is the very program that trains its config alone, so the best one's config gives the same number, and the kernel
ends it with its actor.

Nothing of Tune's own state is kept. Run folders say how far each trial is, so a killed sweep goes on from there: Tuner.restore
would know only what was in its last snapshot. Who is stopped is decided by Tune's ASHA; the word goes through RUN/trial.json,
and the trial saves and ends by itself, because Tune gives an actor that it stops at the end only 5 s.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster import attempts
from cluster.progress import Tail
from cluster.runfolder import RunFolder
from cluster.sweep_plan import REDUCTION, Trial
from cluster.sweep_state import WORST, note_end, noted_end, score

POLL_S = 0.3
LAST_LINES = 2000  # characters of a log that are looked at for the reason
TIME, SCORE, NAME = "step", "score", "trial"
NOTHING = {"done": True, TIME: 0, SCORE: WORST}  # of a trial that ends without a score; step 0 lies below every rung


@dataclass(frozen=True, slots=True)
class Work:
    """What the actors are handed. seen: steps whose evaluations ASHA knows from before. request: a file that stops all."""

    trials: Mapping[str, Trial]
    seen: Mapping[str, int]
    tags: Mapping[str, Mapping[str, str]]
    metric: str
    request: Path
    environment: Mapping[str, str]
    cwd: Path


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Trains one config; a step of it is an evaluation. Raises RuntimeError when the process was killed: Tune starts again."""

    def setup(self, config: dict[str, Any], work: Work | None = None) -> None:
        assert work is not None
        self._work, self._trial = work, work.trials[config[NAME]]
        self._told_to_end_at: float | None = None
        self._tail = Tail(RunFolder(self._trial.run).metrics)
        self._rows: list[dict[str, Any]] = []
        self._process = None if self._asked() else self._start()

    def step(self) -> dict[str, Any]:
        while True:
            code = -1 if self._process is None else self._process.poll()  # before the rows: then none is missed below
            self._rows += [row for row in self._tail.read() if self._counts(row)]
            if self._rows:
                row = self._rows.pop(0)
                return {TIME: row["step"], SCORE: score(self._work.metric, row[f"val/{self._work.metric}"])}
            if self._process is None or code is not None:
                return self._ended(code or 0)
            self._end_where_asked(self._process)
            time.sleep(POLL_S)

    def cleanup(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        run, config = self._trial.run, self._trial.config
        run.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(max(1, int(config.cluster.cpus_per_worker)))}  # Ray sets it for the whole trial
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with (run / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cluster.sweep_trial", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, **threads, **paths, **self._work.environment},
                cwd=self._work.cwd if self._work.cwd.exists() else run,
            )
        assert process.stdin is not None
        tree = config.model_dump(mode="json", by_alias=True)
        with process.stdin as pipe:
            pipe.write(json.dumps({"config": tree, "tags": dict(self._work.tags[self._trial.name])}))
        return process

    def _counts(self, row: Mapping[str, Any]) -> bool:
        """Whether ASHA is to see it now: the last one is told when the run has ended, so that none is stopped at its end."""
        known = self._work.seen.get(self._trial.name, 0)
        return f"val/{self._work.metric}" in row and known < row["step"] < self._trial.steps

    def _asked(self) -> bool:
        return self._work.request.exists() or noted_end(self._trial.run).get("status") == "STOPPED"

    def _end_where_asked(self, process: subprocess.Popen[str]) -> None:
        """SIGTERM, upon which all ranks save at the same step; SIGKILL when that takes longer than any step may."""
        if self._told_to_end_at is None and self._asked():
            self._told_to_end_at = time.monotonic()
            process.terminate()
        elif time.monotonic() - (self._told_to_end_at or math.inf) > self._trial.config.cluster.timeout_s:
            process.kill()

    def _ended(self, code: int) -> dict[str, Any]:
        result = RunFolder(self._trial.run).result() or {}
        if result.get("status") == "FINISHED":
            last = result["metrics"].get(self._work.metric)
            return NOTHING if last is None else {"done": True, TIME: result["steps"], SCORE: score(self._work.metric, last)}
        if not self._asked():
            if code in (0, 1, 2):
                note_end(self._trial.run, "FAILED", self._reason())
            else:
                raise RuntimeError(f"trial {self._trial.name} was killed (exit code {code})")
        return NOTHING

    def _reason(self) -> str:
        word = attempts.word(self._trial.run)
        if word is not None:
            return word
        text = (self._trial.run / "log.txt").read_text(encoding="utf-8", errors="replace")[-LAST_LINES:].strip()
        return text.rpartition("nearfar: ")[2].strip() or "it left no word"


class Given(Searcher):  # type: ignore[misc]
    """Hands out the trials of the plan, one after the other; their settings have been drawn before."""

    def __init__(self, trials: list[Trial], request: Path) -> None:
        super().__init__()
        self._left, self._request = list(trials), request
        self._runs: dict[str, Path] = {}

    def suggest(self, trial_id: str) -> Any:
        if not self._left or self._request.exists():
            return Searcher.FINISHED
        trial = self._left.pop(0)
        self._runs[trial_id] = trial.run
        return {NAME: trial.name}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            note_end(self._runs[trial_id], "FAILED", "killed again and again: out of memory, or a lost machine? see log.txt")

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text("")  # run folders are the memory

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its run folders")


class Halving(ASHAScheduler):  # type: ignore[misc]
    """Tune's ASHA, which knows trials by name, so that it can be told of a killed driver's; it leaves word, see above."""

    def __init__(self, runs: Mapping[str, Path], *, grace_steps: int, steps: int) -> None:
        more = {"reduction_factor": REDUCTION, "stop_last_trials": False}
        super().__init__(TIME, SCORE, "max", max_t=steps, grace_period=grace_steps, **more)
        self._runs = runs

    def remember(self, name: str, step: int, value: float, *, last: bool) -> None:
        """Of a trial before this driver; one that went on afterwards was not stopped by it."""
        trial = SimpleNamespace(config={NAME: name})
        if name not in self._trial_info:
            self.on_trial_add(None, trial)
        self._decide(trial, {TIME: step, SCORE: value}, bound=last)

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        super().on_trial_add(controller, _named(trial))

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._decide(trial, result, bound=True)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(controller, _named(trial), result)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        super().on_trial_remove(controller, _named(trial))

    def _decide(self, trial: Any, result: dict[str, Any], *, bound: bool) -> None:
        decision = super().on_trial_result(None, _named(trial), result)
        if decision == TrialScheduler.STOP and bound:
            reason = f"stopped early at step {result[TIME]}: not among the best third there"
            note_end(self._runs[trial.config[NAME]], "STOPPED", reason)


def _named(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config[NAME])
