"""How far the trials of a sweep are: read from their folders, which are the only memory that a sweep has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.run_table import lined_up
from cluster.runfolder import RunFolder, read_lines, write_atomically
from cluster.sweep_plan import Plan, Trial
from configs.evaluation import goodness

Status = Literal["FINISHED", "STOPPED", "FAILED", "UNFINISHED"]
ORDER = ("FINISHED", "STOPPED", "UNFINISHED", "FAILED")
WORST = -1e12  # a metric that is not finite


@dataclass(frozen=True, slots=True)
class Standing:
    """One trial. value: of the last evaluation."""

    trial: Trial
    status: Status
    steps: int
    value: float | None
    reason: str | None

    def as_dict(self, rank: int) -> dict[str, Any]:
        named = {"rank": rank, "trial": self.trial.name, "run": str(self.trial.run), "status": self.status}
        return {**named, "value": self.value, "steps": self.steps, "settings": self.trial.point, "reason": self.reason}


def note_end(run: Path, status: Literal["STOPPED", "FAILED"], reason: str) -> None:
    """Write RUN/trial.json: why a trial ends without having finished. The first word stays."""
    run.mkdir(parents=True, exist_ok=True)
    if not _file(run).exists():
        write_atomically(_file(run), json.dumps({"status": status, "reason": reason}) + "\n")


def noted_end(run: Path) -> dict[str, str]:
    """What `note_end` has written; empty when nothing has."""
    found: dict[str, str] = json.loads(_file(run).read_text(encoding="utf-8")) if _file(run).exists() else {}
    return found


def forget_end(run: Path) -> None:
    """Let a trial that failed be tried again."""
    _file(run).unlink(missing_ok=True)


def evaluations(run: Path, metric: str) -> Iterator[tuple[float, int, float]]:
    """Time (seconds since 1970), step and value of each, without that of the untrained encoder."""
    for row in read_lines(RunFolder(run).metrics):
        if row["step"] > 0 and f"val/{metric}" in row:
            yield row["time"], row["step"], row[f"val/{metric}"]


def score(metric: str, value: float) -> float:
    """Larger is better."""
    found = goodness(metric, value)
    return found if WORST < found < -WORST else WORST


def complete(trial: Trial) -> bool:
    """Whether nothing of a trial is left to do; cheap, unlike its standing."""
    result, end = RunFolder(trial.run).result(), noted_end(trial.run).get("status")
    finished = result is not None and result["status"] == "FINISHED"
    return finished or end == "FAILED" or (end == "STOPPED" and result is not None)


def standing(trial: Trial, metric: str) -> Standing:
    result, end = RunFolder(trial.run).result(), noted_end(trial.run)
    last = list(evaluations(trial.run, metric))[-1:]
    steps, value = (last[0][1], last[0][2]) if last else (0, None)
    if result is not None and result["status"] == "FINISHED":
        return Standing(trial, "FINISHED", result["steps"], result["metrics"].get(metric), None)
    if end:
        return Standing(trial, "STOPPED" if end["status"] == "STOPPED" else "FAILED", steps, value, end["reason"])
    return Standing(trial, "UNFINISHED", steps, value, None)


def ranked(plan: Plan) -> list[Standing]:
    """The best first: those that finished before those that were stopped, however good those were at their time."""

    def key(one: Standing) -> tuple[int, float, int]:
        value = WORST if one.value is None else score(plan.metric, one.value)
        return ORDER.index(one.status), -value, one.trial.number

    return sorted((standing(trial, plan.metric) for trial in plan.trials), key=key)


def table(plan: Plan, found: Sequence[Standing]) -> str:
    """For a person; what failed says why below."""
    keys = [one.key for one in plan.space.settings]
    lines = [("rank", "trial", plan.metric, "steps", "status", *keys)]
    for rank, one in enumerate(found, 1):
        value = "-" if one.value is None else f"{one.value:.4f}"
        settings = [_brief(one.trial.point[key]) for key in keys]
        lines.append((str(rank), one.trial.name, value, str(one.steps), one.status, *settings))
    reasons = [f"{one.trial.name} failed: {one.reason}" for one in found if one.status == "FAILED"]
    return "\n".join([lined_up(lines), *reasons])


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _file(run: Path) -> Path:
    return run / "trial.json"
