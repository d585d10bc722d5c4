"""The folder of a run: the one place where workers, driver and tools meet.

config.yaml  metrics.jsonl  attempts.jsonl  quarantine.jsonl  leakage.json  hashes.jsonl  stacks/
checkpoints/  init.safetensors  export/  report/  profile/  result.json  tracking.json  description.json
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import naming_full_disk
from configs.load import dump_config, load_config
from configs.schema import RunConfig
from trainer.stores import Store, open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`path` is absolute: workers run in other directories."""

    path: Path

    @staticmethod
    def of(config: RunConfig) -> RunFolder:
        return RunFolder(Path(config.cluster.storage).expanduser().absolute() / config.name)

    @staticmethod
    def existing(path: Path) -> RunFolder:
        """The folder of a run that was begun. Raises ValueError when it is none."""
        folder = RunFolder(path)
        if not folder.exists():
            raise ValueError(f"{path} is no run's folder: it holds no config.yaml")
        return folder

    def checkpoints(self, config: RunConfig) -> Store:
        """Where this run's checkpoints are."""
        elsewhere = config.cluster.checkpoints
        return open_store(self.path / "checkpoints" if elsewhere is None else f"{elsewhere.rstrip('/')}/{config.name}")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def hashes(self) -> Path:
        return self.path / "hashes.jsonl"

    @property
    def stacks(self) -> Path:
        """Where the threads of ranks that hung were."""
        return self.path / "stacks"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def profile(self) -> Path:
        """Where the time of a step goes, when that was asked for."""
        return self.path / "profile"

    @property
    def init(self) -> Path:
        return self.path / "init.safetensors"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def description(self) -> Path:
        return self.path / "description.json"

    @property
    def tracking_lock(self) -> Path:
        return self.path / ".tracking.lock"

    def artifacts(self) -> dict[Path, str]:
        """What is kept of the run in MLflow beside its metrics: local path -> folder there, "" for the root."""
        report = self.path / "report"
        named = {report: "report", self.profile: "profile"}
        return {self.config_file: "", self.metrics: "", **named, self.result_file: ""}

    def exists(self) -> bool:
        return self.config_file.exists()

    def refuse(self, config: RunConfig, *, resume: bool) -> None:
        """Raise ValueError when the name is taken and `resume` is false, or when the run there computes something else."""
        if self.exists() and not resume:
            raise ValueError(f"run {config.name!r} exists in {self.path}; continue it with --resume, or choose another name")
        if not self.exists():
            return
        refuse_changes(f"run {config.name!r}", self.config().identity(), config.identity())

    def claim(self, config: RunConfig) -> None:
        """Make the folder with its config. A result of an earlier start goes: none means that the driver was killed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.result_file.unlink(missing_ok=True)
        write_atomically(self.config_file, dump_config(config))

    def config(self) -> RunConfig:
        return load_config(self.config_file)

    def result(self) -> dict[str, Any] | None:
        if not self.result_file.exists():
            return None
        found: dict[str, Any] = json.loads(self.result_file.read_text())
        return found

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_atomically(self.result_file, json.dumps(result, indent=1))


def refuse_changes(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError that lists what is not as it was, among the settings and data that decide what a run computes."""
    before, now = flat(before), flat(now)
    changed = [f"  {k}: {before.get(k)!r} -> {now.get(k)!r}" for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        raise ValueError(f"{what} cannot be resumed: these decide what it computes, and changed:\n" + "\n".join(changed))


class MetricsFile:
    """Appends to metrics.jsonl: one object a step; a step that is there already is not written again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = -1
        lines = list(read_lines(path))
        if lines:
            self.last = max(line["step"] for line in lines)
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # the last writer was killed in mid-line
            whole = path.read_bytes().rpartition(b"\n")
            write_atomically(path, (whole[0] + whole[1]).decode())

    def append(self, step: int, values: Mapping[str, float], *, at: float) -> None:
        """at: seconds since 1970."""
        if step <= self.last:
            return
        append_line(self.path, {"step": step, "time": at, **values})
        self.last = step


def note_hash(path: Path, step: int, weights: str) -> None:
    """Append the hash of a step's weights, once; warn when the step has been reached with others before."""
    before = [row["weights"] for row in read_lines(path) if row["step"] == step]
    if before and before[-1] != weights:
        logger.warning(
            "step %d: the weights are %s, but were %s before the restart: another kind of machine, or other libraries?",
            *(step, weights, before[-1]),
        )
    if not before or before[-1] != weights:
        append_line(path, {"step": step, "weights": weights})


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """One JSON object as one line, in one write. Raises DiskFull, and then leaves no part of it."""
    line = (json.dumps(row) + "\n").encode()
    with naming_full_disk(path), path.open("ab", buffering=0) as file:
        written = file.write(line)
        if written < len(line):  # the disk took a part; the next line would follow upon it
            end = file.tell()
            if end == os.fstat(file.fileno()).st_size:
                file.truncate(end - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a JSONL file; nothing when it is not there, a cut last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return  # its writer may be at it: read on, the rest would look like a line of its own
            yield json.loads(line)


def write_atomically(path: Path, text: str) -> None:
    """Raises DiskFull, and then leaves what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming_full_disk(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
