"""Models for the commands that take one; exporting costs seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.encoders import export_small


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With other weights."""
    return export_small(tmp_path_factory.mktemp("other") / "model", seed=1)
