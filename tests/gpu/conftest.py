"""Small runs on the digits, and the models of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CONFIG
from tests.runs import train
from tests.trainer.test_outside_encoders import vit as vit  # a fixture

ON_CARD = "cluster.gpus_per_worker=1"


@pytest.fixture(scope="session")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 steps in float64 by one worker, each of them logged; without MLflow."""
    folder = tmp_path_factory.mktemp("card")
    path = folder / "run.yaml"
    text = CONFIG.format(name="small", shards=digits, storage=folder / "runs").replace("workers: 2", "workers: 1")
    path.write_text(f"{text}tracking: {{enabled: false}}\n")
    return path


@pytest.fixture(scope="session")
def plain(config: Path) -> dict[str, Any]:
    """The run as the config has it, on the GPU."""
    return train(config, "plain", ON_CARD)
