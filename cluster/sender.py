"""Brings one run into one MLflow run, that is found again after any crash; raises what goes wrong, and goes on from there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cluster.description import Description, flatten
from cluster.runfolder import RunFolder, read_lines
from cluster.spool import Point, Position, read_points
from cluster.store import experiment_id, experiment_name, open_client
from configs.schema import RunConfig

BATCH = 1000  # metrics that MLflow takes at once
PARAMS = 100  # params that MLflow takes at once
# a dead server must cost seconds, not MLflow's own four minutes of retries; we try again ourselves
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
RUN_KEY = "nearfar.run_key"
ATTEMPTS = "nearfar.attempts"
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Sender:
    """One run's params, tags, data sets, metrics, ending and artifacts.

    What has arrived is remembered in RUN/tracking.json, so that a later Sender goes on from there; one at a time for a
    folder. Call its methods with `IMPATIENT` in the environment.
    """

    def __init__(self, run: Path, config: RunConfig, about: Description, *, uri: str) -> None:
        self.uri = uri
        self._folder, self._config, self._about = RunFolder(run), config, about
        self._state = run / "tracking.json"
        self._position = Position.read(self._state)
        self._artifacts = self._folder.artifacts()
        self._client: Any = None
        self._began = time.time()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self._position.run_id

    def open(self, *, running: bool) -> None:
        """Find or make the MLflow run, and tell what the run is; `running`: show it as under way."""
        self._position.write(self._state)  # the key first: a run made just before a crash is found again by it
        self._client = self._client or open_client(self.uri)
        run = self._find() or self._create()
        if run.info.run_id != self._position.run_id:
            self._move(replace(self._position, run_id=run.info.run_id, offset=0))
        if running:
            self._client.update_run(self.run_id, status="RUNNING")
        self._describe(run)

    def send(self, told: Callable[[int], None] = lambda rows: None) -> None:
        """Everything new in the spool, in batches; after each that arrived the position moves and `told` gets its rows."""
        waiting: list[Point] = []
        rows, end = 0, self._position.offset
        for offset, points in read_points(self._folder.metrics, self._position.offset):
            if waiting and len(waiting) + len(points) > BATCH:
                self._deliver(waiting, end)
                told(rows)
                waiting, rows = [], 0
            waiting.extend(points)
            rows, end = rows + bool(points), offset
        if end != self._position.offset:
            self._deliver(waiting, end)
            told(rows)

    def waiting(self) -> int:
        """Rows of metrics that have not arrived."""
        return sum(bool(points) for _, points in read_points(self._folder.metrics, self._position.offset))

    def close(self, status: Status, *, ended: float | None = None) -> None:
        """Set the final status, with the time `ended` (seconds since 1970; default: now), then send the artifacts.

        A run that has this status already keeps its time. Tried again, it sends the artifacts that have not arrived.
        """
        self._client.set_tag(self.run_id, ATTEMPTS, str(len(list(read_lines(self._folder.attempts)))))
        info = self._client.get_run(self.run_id).info
        if info.status != status or info.end_time is None:
            self._client.set_terminated(self.run_id, status, None if ended is None else max(int(ended * 1000), info.start_time))
        for path, folder in list(self._artifacts.items()):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder or None)
            elif path.exists():
                self._client.log_artifact(self.run_id, str(path), folder or None)
            del self._artifacts[path]

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
        """A run that began when training did, however late the server is."""
        first = next(read_lines(self._folder.attempts), {})
        began = min(self._began, float(first.get("time", self._began)))
        tags = {RUN_KEY: self._position.run_key}
        return self._client.create_run(self._experiment(), int(began * 1000), tags, run_name=self._config.name)

    def _experiment(self) -> str:
        name = experiment_name(self._config.tracking)
        return experiment_id(self._client, name, self.uri, self._folder.path.parent)

    def _describe(self, run: Any) -> None:
        """Tags, and what the run does not have yet of params (MLflow takes each once) and data sets."""
        from mlflow.entities import Param, RunTag

        known, settings = run.data.params, self._config.model_dump(mode="json", by_alias=True)
        params = [Param(key, value) for key, value in flatten(settings) if key not in known]
        tags = [RunTag(key, value) for key, value in self._about.tags.items()]
        for start in range(0, max(len(params), 1), PARAMS):
            self._client.log_batch(run.info.run_id, params=params[start : start + PARAMS], tags=tags)
            tags = []
        there = {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs} if run.inputs else set()
        missing = [data.entity() for data in self._about.datasets if data.identity() not in there]
        if missing:
            self._client.log_inputs(run.info.run_id, missing)

    def _deliver(self, points: Sequence[Point], end: int) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), BATCH):
            metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points[start : start + BATCH]]
            self._client.log_batch(self.run_id, metrics=metrics)
        self._move(replace(self._position, offset=end))

    def _move(self, position: Position) -> None:
        position.write(self._state)
        self._position = position
