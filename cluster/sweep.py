"""A sweep: many runs of one config with other settings, the bad ones stopped early, the best one's config as the result."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from cluster.capacity import places
from cluster.context import refuse_few_gpus
from cluster.launch import in_a_thread, init_ray, quiet_ray
from cluster.lock import Held, Lock
from cluster.progress import bar, say
from cluster.run import Interrupted, JobFailed
from cluster.runfolder import MetricsFile, RunFolder, write_atomically
from cluster.stopping import Stopping
from cluster.sweep_plan import Plan, Trial, claim
from cluster.sweep_state import Standing, complete, evaluations, forget_end, note_end, ranked, score, standing
from cluster.sweep_trial import settle
from cluster.tracking import Tracker
from configs.load import dump_config

PARENT_S = 20.0  # to wait for MLflow before the first trial, so that all lie inside the sweep's run
JOINING_S = 10.0  # to wait for nodes of a cluster that is only starting
LOOK_S = 2.0
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # whose tables come even when told to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
AGAIN = "the same command goes on"
logger = logging.getLogger(__name__)


def run(
    plan: Plan, *, parallel: int | None = None, address: str | None = None, retry_failed: bool = False
) -> tuple[dict[str, Any], list[Standing]]:
    """Train what is left of the trials; returns what sweep.json holds, and the trials, the best first.

    parallel: so many at once at most; on this machine's own Ray they are then started even where cores are short.
    Raises ValueError for a sweep that was another one, RuntimeError for a cluster that is too small, JobFailed when no trial
    finished, Interrupted when told to stop.
    """
    if address is None and plan.config.cluster.gpus_per_worker > 0:  # at once, not when Ray is up
        refuse_few_gpus(plan.config.cluster.most_workers)
    claim(plan)
    lock = Lock(plan.folder / ".sweep.lock")
    try:
        lock.take()
    except Held as error:
        raise ValueError(f"sweep {plan.name!r} is being run by {error.holder}") from error
    try:
        return _run(plan, parallel, address, retry_failed)
    finally:
        lock.release()


def _run(plan: Plan, parallel: int | None, address: str | None, retry_failed: bool) -> tuple[dict[str, Any], list[Standing]]:
    for trial in plan.trials:
        if retry_failed and standing(trial, plan.metric).status == "FAILED":
            forget_end(trial.run)
        settle(trial.config, trial.run)
    left = [trial for trial in plan.trials if not complete(trial)]
    if not left and (plan.folder / "sweep.json").exists():
        before = json.loads((plan.folder / "sweep.json").read_text(encoding="utf-8"))
        if before["best"] is not None:
            say(f"sweep {plan.name!r} is finished; nothing to do")
            return before, ranked(plan)
    tracker = (
        Tracker(plan.folder, plan.configured({}, plan.name), tags={"nearfar.sweep": plan.name}) if _tracked(plan) else None
    )
    stopping = Stopping()
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with stopping:
            if tracker is not None:
                tracker.start()
            if left:
                _train(plan, left, tracker, stopping, parallel, address)
            for trial in plan.trials:
                settle(trial.config, trial.run)
            if stopping.number is not None:
                raise Interrupted(f"{stopping.reason}; the trials have saved, {AGAIN}", stopping.exit_code)
            found = _conclude(plan, tracker)
            status = "FINISHED"
            return found
    except Interrupted:
        status = "KILLED"
        raise
    except KeyboardInterrupt as interrupt:
        status = "KILLED"
        raise Interrupted(f"interrupted; {AGAIN} from the trials' last checkpoints", stopping.exit_code) from interrupt
    finally:
        if tracker is not None:
            tracker.finish(status, timeout_s=60 if status == "FINISHED" else 10)
            if status == "FINISHED":
                _send_files(plan, tracker)


def _tracked(plan: Plan) -> bool:
    return plan.config.tracking.enabled


def _train(
    plan: Plan, left: list[Trial], tracker: Tracker | None, stopping: Stopping, parallel: int | None, address: str | None
) -> None:
    quiet_ray()
    os.environ |= QUIET_TUNE
    with redirect_stdout(sys.stderr):
        import ray

        started = not ray.is_initialized()
        if started:
            init_ray(address, plan.cpus * (parallel or 1), otherwise="a sweep needs Ray")
        stopping.listen()
        try:
            _refuse_too_small(plan, on_cluster=address is not None)
            parent = None if tracker is None else tracker.wait(PARENT_S)
            if tracker is not None and parent is None:
                logger.warning("MLflow does not answer: the trials will not lie inside a run of the sweep there")
            request = plan.folder / ".request"
            with stopping.asked_through(request):
                tuner = _tuner(plan, left, parent, request, parallel)
                say(
                    f"{plan.name}: {len(left)} of {len(plan.trials)} trials to train, {plan.steps} steps each at most, "
                    + (
                        "none stopped early"
                        if plan.grace_steps is None
                        else f"bad ones stopped from step {plan.grace_steps} on"
                    )
                )
                watch = _Watch(plan)
                with bar("sweep", "trials") as report:
                    in_a_thread(tuner.fit, lambda: watch.look(report), every_s=LOOK_S)
        except Exception as error:
            if type(error).__module__.startswith("ray."):
                raise RuntimeError(f"Ray Tune: {str(error).strip().splitlines()[-1]}") from error
            raise
        finally:
            shutil.rmtree(plan.folder / ".tune", ignore_errors=True)
            if started:
                ray.shutdown()


def _tuner(plan: Plan, left: list[Trial], parent: str | None, request: Path, parallel: int | None) -> Any:
    from ray import tune

    from cluster.sweep_tune import Given, Halving, TrialActor, Work

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told in the table
    trials = {trial.name: trial for trial in left}
    scheduler = None
    seen: dict[str, int] = {}
    if plan.grace_steps is not None:
        runs = {trial.name: trial.run for trial in plan.trials}
        scheduler = Halving(runs, grace_steps=plan.grace_steps, steps=plan.steps)
        seen = _tell_of_before(plan, scheduler)
    tags = {name: _tags(plan, name, parent) for name in trials}
    environment = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "NEARFAR_")) and k != "MLFLOW_RUN_ID"}
    work = Work(trials, seen, tags, plan.metric, request, environment, Path.cwd())
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialActor, work=work),
            tune.PlacementGroupFactory([{"CPU": plan.cpus} | ({"GPU": plan.gpus} if plan.gpus else {})]),
        ),
        tune_config=tune.TuneConfig(
            search_alg=Given(list(trials.values()), request),
            scheduler=scheduler,
            num_samples=len(trials),
            max_concurrent_trials=parallel,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(plan.folder / ".tune"),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=plan.config.cluster.max_failures),
            verbose=0,
        ),
    )


def _tell_of_before(plan: Plan, scheduler: Any) -> dict[str, int]:
    """Every evaluation of earlier drivers, in the order of time; the last step of each trial."""
    rows = sorted((at, step, value, t.name) for t in plan.trials for at, step, value in evaluations(t.run, plan.metric))
    seen = {name: step for _, step, _, name in rows}
    done = {trial.name for trial in plan.trials if complete(trial)}
    for _, step, value, name in rows:
        last = step == seen[name] and name not in done
        scheduler.remember(name, step, score(plan.metric, value), last=last)
    return seen


def _tags(plan: Plan, name: str, parent: str | None) -> Mapping[str, str]:
    nested = {} if parent is None else {"mlflow.parentRunId": parent}
    return {"nearfar.sweep": plan.name, "nearfar.sweep.trial": name, **nested}


def _refuse_too_small(plan: Plan, *, on_cluster: bool) -> None:
    """Tune would wait for ever, and say nothing."""
    import ray

    deadline = time.monotonic() + (JOINING_S if on_cluster else 0.0)
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(places(node, {"CPU": plan.cpus, "GPU": plan.gpus}, 1) for node in nodes):
            break
        if time.monotonic() > deadline:
            most = " and ".join(f"{max((node.get(kind, 0) for node in nodes), default=0):g} {kind}s" for kind in ("CPU", "GPU"))
            raise RuntimeError(
                f"a trial needs {plan.cpus:g} CPUs and {plan.gpus:g} GPUs on one node for cluster.workers="
                f"{plan.config.cluster.workers}, but no node has more than {most}; lower cluster.workers"
            )
        time.sleep(1)
    uri = plan.trials[0].config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if _tracked(plan) and uri.startswith("sqlite") and len({n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}) > 1:
        raise ValueError(
            "tracking.uri: trials on several machines cannot share a sqlite file; name a server, or set tracking.enabled=false"
        )


class _Watch:
    """Tells of trials that have ended, and writes the best so far for MLflow."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._ended = {trial.name: standing(trial, plan.metric) for trial in plan.trials if complete(trial)}
        self._best = MetricsFile(RunFolder(plan.folder).metrics)

    def look(self, report: Callable[..., None]) -> None:
        for trial in self._plan.trials:
            if trial.name not in self._ended and complete(trial):
                one = self._ended[trial.name] = standing(trial, self._plan.metric)
                value = "" if one.value is None else f", {self._plan.metric} {one.value:.4f}"
                say(f"{trial.name}: {one.reason or 'finished'}{value}  {_brief(trial.point)}")
                if (best := self._so_far()) is not None:
                    self._best.append(len(self._ended), {f"val/{self._plan.metric}": best}, at=time.time())
        best = self._so_far()
        note = "" if best is None else f"best {self._plan.metric} {best:.4f}"
        report(len(self._ended), len(self._plan.trials), note)

    def _so_far(self) -> float | None:
        values = [one.value for one in self._ended.values() if one.status == "FINISHED" and one.value is not None]
        return max(values, key=lambda value: score(self._plan.metric, value), default=None)


def _conclude(plan: Plan, tracker: Tracker | None) -> tuple[dict[str, Any], list[Standing]]:
    """sweep.json and best.yaml. Trials that Tune has left are failures: nothing may be told as finished that is not."""
    for one in ranked(plan):
        if one.status == "UNFINISHED":
            note_end(one.trial.run, "FAILED", "it never came to an end; see log.txt")
    found = ranked(plan)
    best = found[0] if found[0].status == "FINISHED" and found[0].value is not None else None
    config = plan.folder / "best.yaml"
    if best is not None:
        write_atomically(config, dump_config(plan.configured(best.trial.point, f"{plan.name}-best")))
    result = {
        "status": "FINISHED" if best is not None else "FAILED",
        "name": plan.name,
        "folder": str(plan.folder),
        "metric": plan.metric,
        "best": None if best is None else {**best.as_dict(1), "config": str(config)},
        "trials": [one.as_dict(rank) for rank, one in enumerate(found, 1)],
        "mlflow_run_id": None if tracker is None else tracker.run_id,
    }
    write_atomically(plan.folder / "sweep.json", json.dumps(result, indent=1) + "\n")
    if best is None:
        reasons = {one.reason for one in found if one.status == "FAILED"}
        raise JobFailed(
            f"no trial of sweep {plan.name!r} finished: {'; '.join(sorted(filter(None, reasons)))}\n"
            "after mending it, the same command with --retry-failed goes on"
        )
    return result, found


def _send_files(plan: Plan, tracker: Tracker) -> None:
    from cluster.sender import IMPATIENT
    from cluster.store import brief, environment, open_client

    try:
        with environment(IMPATIENT):
            for name in ("best.yaml", "sweep.json"):
                open_client(tracker.uri).log_artifact(tracker.run_id, str(plan.folder / name))
    except Exception as error:  # MLflow raises what its database or its HTTP client raises
        logger.warning("MLflow has not got best.yaml and sweep.json, which are in %s: %s", plan.folder, brief(error))


def _brief(point: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in point.items())
