"""Ctrl-C and SIGTERM at the driver."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cluster.stopping import Stopping


def test_the_first_signal_asks_and_the_second_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stopping() as stopping:
        with stopping.asked_through(tmp_path / "request"):
            os.kill(os.getpid(), signal.SIGTERM)
            assert (tmp_path / "request").read_text() == "stopped by SIGTERM"
            assert stopping.exit_code == 143
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert not (tmp_path / "request").exists()
        assert stopping.reason == "stopped by SIGTERM"  # the first one counts
    assert signal.getsignal(signal.SIGTERM) == before
    assert "once more stops at once" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_nobody_can_be_asked_to_save(number: int, tmp_path: Path) -> None:
    with Stopping(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    with Stopping() as full, full.asked_through(tmp_path / "gone" / "request"), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
