"""Memory that runs out is answered with the setting that needs less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster import worker
from cluster.context import single
from cluster.job import Job, refuse_useless
from cluster.memory import memory_advice, out_of_memory
from cluster.worker import worker_main
from configs.errors import Unrecoverable
from configs.load import parse_config
from configs.schema import RunConfig


def config_of(**train: object) -> RunConfig:
    data = {"train": "x", "batch": 64, "per_class": 4}
    return parse_config({"name": "a", "data": data, "train": {"steps": 1, **train}, "cluster": {"workers": 2}})


def test_an_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.parametrize(
    ("now", "words"), [(None, "micro_batch to 16 (now 32"), (16, "micro_batch to 8"), (4, "as low as it can")]
)
def test_the_advice_is_half_of_what_there_is(now: int | None, words: str) -> None:
    assert words in memory_advice(config_of(micro_batch=now), RuntimeError("x"))


def test_a_run_out_of_memory_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(config_of(), tmp_path, steps=1, histories=(), launch_id="one")
    monkeypatch.setattr(worker, "_train", lambda context, job: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(Unrecoverable, match=r"train\.micro_batch"):
        worker_main(single(gpu=False), job)
    with pytest.raises(Unrecoverable, match=r"train\.micro_batch"):
        refuse_useless(job)
