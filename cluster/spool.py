"""The metric spool: rank 0 appends lines to metrics.jsonl, the driver reads them from a position that it remembers."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VERSION = 1
BLOCK = 1 << 20  # bytes read at once
ILLEGAL = re.compile(r"[^A-Za-z0-9_\-./: ]")


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric; `time_ms` is milliseconds since 1970."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True, slots=True)
class Position:
    """How far which MLflow run has got; `run_key` finds that run again if we died before learning its id."""

    run_key: str
    run_id: str | None = None
    offset: int = 0  # bytes of metrics.jsonl that have arrived

    @staticmethod
    def read(path: Path) -> Position:
        """The stored position, or a new one with a fresh key; RuntimeError for a version we do not know."""
        if not path.exists():
            return Position(run_key=uuid.uuid4().hex)
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.pop("version", None) != VERSION:
            raise RuntimeError(f"{path} was written by another version of nearfar; remove it to send all metrics again")
        return Position(**stored)

    def write(self, path: Path) -> None:
        """Replace the stored position in one step."""
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps({"version": VERSION, **asdict(self)}) + "\n", encoding="utf-8")
        temporary.replace(path)


def read_points(path: Path, offset: int) -> Iterator[tuple[int, list[Point]]]:
    """The points of every complete line after byte `offset`, with the offset behind that line; waits for nothing."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if offset > file.seek(0, os.SEEK_END):
            offset = 0  # the file was replaced by a shorter one: everything in it is new
        file.seek(offset)
        rest = b""
        while block := file.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield offset, _points(line, path, offset)


def _points(line: bytes, path: Path, offset: int) -> list[Point]:
    if not line.strip():
        return []
    try:
        record: dict[str, Any] = json.loads(line)
        step, time_ms = int(record.pop("step")), int(float(record.pop("time")) * 1000)
        numbers = {key: float(value) for key, value in record.items() if type(value) in (int, float)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        logger.warning("%s: the line that ends at byte %d is no metric line and is skipped", path, offset)
        return []
    return [Point(_legal(key), value, time_ms, step) for key, value in numbers.items()]


def _legal(key: str) -> str:
    """A name that MLflow takes: one illegal name would make it refuse the whole batch."""
    return posixpath.normpath(ILLEGAL.sub("_", key)).lstrip("/.")[:250] or "unnamed"
