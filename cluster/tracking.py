"""A run's life in MLflow, written by a thread of the driver that follows metrics.jsonl and never disturbs training."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.spool import Point, Position, read_points
from cluster.store import environment, experiment_id, experiment_name, open_client, redact, tracking_uri
from configs.schema import RunConfig

logger = logging.getLogger(__name__)

POLL_S = 1.0
LONGEST_DELAY_S = 30.0
BATCH = 1000  # metrics that MLflow takes at once
DIGEST = 36  # characters that MLflow keeps of a data set's digest
# a dead server must cost seconds, not MLflow's own four minutes of retries; we try again ourselves
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
RUN_KEY = "nearfar.run_key"
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True)
class DatasetRef:
    """A data set as MLflow shows it: `digest` of its manifest, `source` path or URI, `context` training or evaluation."""

    name: str
    digest: str
    source: str
    context: Literal["training", "evaluation"] = "training"
    profile: Mapping[str, int] = field(default_factory=dict)


class Tracker:
    """Sends one run's params, metrics and artifacts to one MLflow run, found again after any crash.

    `start` returns at once; nothing here raises into training. What has arrived is remembered in RUN/tracking.json,
    so that a later Tracker for the same folder goes on from there. Raises ValueError for an impossible `tracking.uri`.
    """

    def __init__(
        self, run: Path, config: RunConfig, *, tags: Mapping[str, str] | None = None, datasets: Sequence[DatasetRef] = ()
    ) -> None:
        self.uri = tracking_uri(config.tracking, run.parent)
        self._run, self._config, self._tags, self._datasets = run, config, dict(tags or {}), tuple(datasets)
        self._state = run / "tracking.json"
        self._position = Position.read(self._state)
        self._client: Any = None
        self._opened, self._stop = threading.Event(), threading.Event()
        self._deadline = float("inf")
        self._ending: tuple[Status, dict[Path, str]] = ("FINISHED", {})
        self._complete = self._silent = False
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._follow, name="nearfar-tracking", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self._position.run_id

    def start(self) -> None:
        """Begin to follow RUN/metrics.jsonl in the background."""
        self._stack.enter_context(environment(IMPATIENT))
        self._thread.start()

    def wait(self, timeout_s: float) -> str | None:
        """The id of the MLflow run as soon as it is open, or None when that takes longer than `timeout_s`."""
        self._opened.wait(timeout_s)
        return self.run_id if self._opened.is_set() else None

    def finish(self, status: Status, artifacts: Mapping[Path, str] | None = None, *, timeout_s: float = 60) -> bool:
        """Send the rest, then `artifacts` (local path -> folder in MLflow, "" for the root), then set the status.

        False when not all of it arrived within `timeout_s`: a warning says so, and the next start sends the metrics.
        """
        self._ending = (status, dict(artifacts or {}))
        self._deadline = time.monotonic() + timeout_s
        self._stop.set()
        self._thread.join(timeout_s + 1)
        self._stack.close()
        if not self._complete:
            logger.warning("MLflow at %s has not got everything; the metrics are safe in %s", redact(self.uri), self._run)
        return self._complete

    def _follow(self) -> None:
        delay = POLL_S
        while not self._complete:
            stopping = self._stop.is_set()  # read first: what was written before `finish` is then sent below
            try:
                self._open()
                self._send()
                if stopping:
                    self._close()
                delay = POLL_S
                self._report(None)
            except Exception as error:  # a thread that dies would lose the rest of the run
                self._report(error)
                delay = min(2 * delay, LONGEST_DELAY_S)
            if time.monotonic() > self._deadline:
                return
            if stopping:
                time.sleep(POLL_S / 4)
            else:
                self._stop.wait(delay)

    def _open(self) -> None:
        if self._opened.is_set():
            return
        self._position.write(self._state)  # the key first: a run made just before a crash is found again by it
        self._client = self._client or open_client(self.uri)
        run = self._find() or self._create()
        if run.info.run_id != self._position.run_id:
            self._move(replace(self._position, run_id=run.info.run_id, offset=0))
        self._client.update_run(run.info.run_id, status="RUNNING")
        self._describe(run)
        self._opened.set()

    def _find(self) -> Any:
        """The run given by MLFLOW_RUN_ID, the one we had, or the one with our key; None where it was never or deleted."""
        from mlflow.exceptions import MlflowException

        given = os.environ.get("MLFLOW_RUN_ID")
        if given:
            return self._client.get_run(given)
        try:
            if self._position.run_id is not None:
                run = self._client.get_run(self._position.run_id)
                return run if run.info.lifecycle_stage == "active" else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        where = f"tags.`{RUN_KEY}` = '{self._position.run_key}'"
        return next(iter(self._client.search_runs([self._experiment()], where, max_results=1)), None)

    def _create(self) -> Any:
        tags = {RUN_KEY: self._position.run_key}
        return self._client.create_run(self._experiment(), run_name=self._config.name, tags=tags)

    def _experiment(self) -> str:
        return experiment_id(self._client, experiment_name(self._config.tracking), self.uri, self._run.parent)

    def _describe(self, run: Any) -> None:
        """Tags, and what the run does not have yet of params (MLflow takes each once) and data sets."""
        from mlflow.entities import Param, RunTag

        known = run.data.params
        params = [
            Param(key, value) for key, value in flatten(self._config.model_dump(mode="json", by_alias=True)) if key not in known
        ]
        tags = [RunTag(key, value) for key, value in self._tags.items()]
        for start in range(0, max(len(params), 1), 100):
            self._client.log_batch(run.info.run_id, params=params[start : start + 100], tags=tags)
            tags = []
        there = {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs} if run.inputs else set()
        missing = [_dataset_input(d) for d in self._datasets if (d.name, d.digest[:DIGEST]) not in there]
        if missing:
            self._client.log_inputs(run.info.run_id, missing)

    def _send(self) -> None:
        """Everything new in the spool, in batches; the position moves after each that arrived."""
        waiting: list[Point] = []
        end = self._position.offset
        for offset, points in read_points(self._run / "metrics.jsonl", self._position.offset):
            if waiting and len(waiting) + len(points) > BATCH:
                self._deliver(waiting, end)
                waiting = []
            waiting.extend(points)
            end = offset
        if end != self._position.offset:
            self._deliver(waiting, end)

    def _deliver(self, points: Sequence[Point], end: int) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), BATCH):
            metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points[start : start + BATCH]]
            self._client.log_batch(self.run_id, metrics=metrics)
        self._move(replace(self._position, offset=end))

    def _close(self) -> None:
        status, artifacts = self._ending
        self._client.set_terminated(self.run_id, status)
        for path, folder in list(artifacts.items()):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder or None)
            elif path.exists():
                self._client.log_artifact(self.run_id, str(path), folder or None)
            del artifacts[path]  # not again when a later one fails and all is retried
        self._complete = True

    def _move(self, position: Position) -> None:
        position.write(self._state)
        self._position = position

    def _report(self, error: Exception | None) -> None:
        if error is not None and not self._silent:
            reason = redact(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            logger.warning(
                "MLflow at %s: %s; training goes on, its metrics wait in %s", redact(self.uri), reason[:300], self._run
            )
        if error is None and self._silent:
            logger.info("MLflow at %s answers again", redact(self.uri))
        self._silent = error is not None


def _dataset_input(data: DatasetRef) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": data.source}), json.dumps(dict(data.profile))
    dataset = Dataset(data.name, data.digest[:DIGEST], "local", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `("a.b", "1")`, as MLflow's params are written; several sections have their numbers."""
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value)}  # one param must not get too long for MLflow
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, None without git; a tag `mlflow.source.git.commit` makes MLflow show it."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
