"""`nearfar demo`, whole: with the digits that need no network, and in acceptance with emoji."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Answer

Nearfar = Callable[..., Answer]


def test_the_demo_with_digits_learns_registers_and_reports(nearfar: Nearfar, tmp_path: Path) -> None:
    answer = nearfar("demo", "--data", "digits", "--out", tmp_path, "--minutes", "0.1")
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert result["model"] == "models:/digits@champion"
    assert result["metrics"]["map_at_r"] > result["before"]["map_at_r"]
    for shown in (result["report"], f"nearfar ui {tmp_path / 'runs'}", "recall@1"):
        assert shown in answer.out


@pytest.mark.acceptance
def test_the_demo_finds_emoji_it_has_never_seen(nearfar: Nearfar, tmp_path: Path) -> None:
    answer = nearfar("demo", "--out", tmp_path)
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "runs" / "emoji" / "result.json").read_text())
    assert result["metrics"]["recall_at_1"] >= 0.55
