"""A killed run whose newest checkpoint is damaged in every way goes on from the one before, to the very same end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runfolder import read_lines
from tests.integration.conftest import Reference
from tests.kills import in_the_step, kill
from tests.runs import assert_equal, start, train
from trainer import checkpoints
from trainer.stores import MANIFEST, name_of

FLIPS = 12  # at random places of every file
Damaged = tuple[str, "bytes | None"]  # what was done to a file, and what it then holds; nothing: it is gone


def damages(data: bytes) -> Iterator[Damaged]:
    for at in (0, len(data) - 1, *random.choices(range(len(data)), k=FLIPS)):
        yield f"byte {at} flipped", data[:at] + bytes([data[at] ^ random.randrange(1, 256)]) + data[at + 1 :]
    yield "cut by a byte", data[:-1]
    yield "cut to nothing", b""
    yield "missing", None


def put(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)


@pytest.mark.acceptance
def test_a_damaged_checkpoint_is_passed_over_whatever_is_wrong_with_it(small: Reference) -> None:
    config, expected = small
    run = Path(expected["run"]).parent / "damaged"
    kill(start(config, run.name, "cluster.workers=2"), run, in_the_step, after=20)
    store = run / "checkpoints"
    last = checkpoints.newest(store)
    assert last is not None
    assert last.step >= 12, "there is one before"
    assert last.position == last.step * 32 // 2, "the units of all batches so far"
    tried = 0
    for file in sorted((store / last.name).iterdir()):
        data = file.read_bytes()
        for what, damaged in damages(data):
            put(file, damaged)
            found, tried = checkpoints.search(store), tried + 1
            if found.skipped or file.name != MANIFEST:  # white space of the manifest may change
                assert found.saved is not None
                assert found.saved.step == last.step - 6, (file.name, what)
                assert len(found.skipped) == 1
                assert file.name in found.skipped[0]
            else:
                assert found.saved == last, (file.name, what)
            file.write_bytes(data)
    print(f"\n{tried} damages of {last.name}, each passed over for {name_of(last.step - 6)}")
    put(store / last.name / "optimizer.pt", None)
    assert_equal(train(config, run.name, "cluster.workers=2", resume=True), expected)
    rows = list(read_lines(run / "attempts.jsonl"))
    assert [row["from_step"] for row in rows] == [0, last.step - 6]
    assert "optimizer.pt is missing" in rows[1]["skipped"][0]
