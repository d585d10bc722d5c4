"""attempts.jsonl: one row for every start of the ranks, which also tells why the one before it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.runfolder import RunFolder, append_line, read_lines, write_atomically

NO_WORD = "it left no word: killed, or its machine was lost"


def begin(
    folder: RunFolder, *, launch: str, world: int, from_step: int, skipped: Sequence[str], more: Mapping[str, Any]
) -> None:
    """Append a row. One rank calls it. skipped: why newer checkpoints than that of `from_step` were passed over."""
    before = any(True for _ in read_lines(folder.attempts))
    row = {"time": time.time(), "launch": launch, "world": world, "from_step": from_step, **more}
    append_line(folder.attempts, {**row, "skipped": list(skipped), "last_ended": _take(folder.path) if before else None})


def begun(folder: RunFolder, launch: str) -> bool:
    """Whether ranks of this launch have started before."""
    return any(row.get("launch") == launch for row in read_lines(folder.attempts))


def ended(run: Path, why: str, *, sure: bool = False) -> None:
    """Leave word for the next start. The first word stays, unless one comes that is `sure`: an exit code beats its echo."""
    with suppress(OSError):  # a full disk is told of elsewhere
        if sure or not _word(run).exists():
            write_atomically(_word(run), why)


def word(run: Path) -> str | None:
    """What the ranks that ended last have left, until the next start takes it."""
    return _word(run).read_text(encoding="utf-8") if _word(run).exists() else None


def _take(run: Path) -> str:
    why = word(run)
    _word(run).unlink(missing_ok=True)
    return NO_WORD if why is None else why


def _word(run: Path) -> Path:
    return run / ".ended"
