"""What MLflow is told of a run besides its metrics: params, tags and data sets; kept in the run's folder for a later sync."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.runfolder import write_atomically

VERSION = 1
JOB = "NEARFAR_JOB"  # id of the Ray job that this runs in
GIT = "NEARFAR_GIT_TAGS"  # of a submitted job: those of the folder that it was submitted from
DIGEST = 36  # characters that MLflow keeps of a data set's digest


@dataclass(frozen=True, slots=True)
class DatasetRef:
    """A data set as MLflow shows it: `digest` of its manifest, `source` path or URI, `context` training or evaluation."""

    name: str
    digest: str
    source: str
    context: Literal["training", "evaluation"] = "training"
    profile: Mapping[str, int] = field(default_factory=dict)

    def identity(self) -> tuple[str, str]:
        """What MLflow tells two data sets apart by."""
        return self.name, self.digest[:DIGEST]

    def entity(self) -> Any:
        """This data set as MLflow's client takes it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, profile = json.dumps({"uri": self.source}), json.dumps(dict(self.profile))
        dataset = Dataset(*self.identity(), "local", source, profile=profile)
        return DatasetInput(dataset, [InputTag("mlflow.data.context", self.context)])


@dataclass(frozen=True, slots=True)
class Description:
    """What only the driver knew; `server` is the address that came from its environment, without a password."""

    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[DatasetRef, ...] = ()
    server: str | None = None

    @staticmethod
    def read(path: Path) -> Description:
        """The stored one, an empty one where there is none; RuntimeError for a version we do not know."""
        if not path.exists():
            return Description()
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("version") != VERSION:
            raise RuntimeError(f"{path} was written by another version of nearfar; remove it to go on without its tags")
        datasets = tuple(DatasetRef(**one) for one in stored["datasets"])
        return Description(stored["tags"], datasets, stored["server"])

    def write(self, path: Path) -> None:
        """Replace the stored one."""
        write_atomically(path, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `("a.b", "1")`, as MLflow's params are written; several sections have their numbers."""
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value)}  # one param must not get too long for MLflow
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def git_tags(folder: Path) -> dict[str, str]:
    """The commit checked out in `folder` and whether files differ from it, as MLflow names them; empty without git."""
    if (submitted := os.environ.get(GIT)) is not None:
        return dict(json.loads(submitted))
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if not commit or changes is None:
        return {}
    return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(bool(changes)).lower()}


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
