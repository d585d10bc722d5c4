"""A rank that hangs ends itself and tells where it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.versions import installed, refuse_skew
from cluster.watchdog import EXIT_CODE
from configs.errors import Unrecoverable

CODE = """
import sys, time
from pathlib import Path
from cluster.watchdog import Watchdog

def deep_sleep():
    time.sleep(60)

out = Path(sys.argv[1])
with Watchdog(out / "stacks" / "rank-3.txt", 0.6, (out / "word").write_text) as dog:
    for step in range(8):
        time.sleep(0.2)
        dog.beat(step)
    deep_sleep()
"""


def test_a_hanging_rank_leaves_its_stacks_and_a_word(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], timeout=50, capture_output=True, text=True)
    assert done.returncode == EXIT_CODE
    assert "in deep_sleep" in (tmp_path / "stacks" / "rank-3.txt").read_text()
    word = (tmp_path / "word").read_text()
    assert word.startswith("hung: nothing done for 0.6 s after step 7 (cluster.timeout_s); where its threads were is in ")
    assert word in done.stderr


def test_other_versions_than_the_drivers_are_refused() -> None:
    refuse_skew(installed())
    refuse_skew({"unheard-of": "1"})
    with pytest.raises(Unrecoverable, match=r"has torch \S+ instead of 1\.0.*install the same there"):
        refuse_skew({**installed(), "torch": "1.0"})
