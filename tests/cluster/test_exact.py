"""`nearfar check --exact` passes what is exact and finds what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Answer

Nearfar = Callable[..., Answer]

# A loss that divides by this rank's own count: the mistake that the check exists for.
LOCAL_MEAN = """
import torch
from trainer.rows import RowLoss, Rows, Terms

class LocalMean(RowLoss):
    def __init__(self, local: bool = True) -> None:
        super().__init__()
        self.local = local
        self.slope = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, rows: Rows) -> Terms:
        terms = self.slope * (1 - rows.at(rows.positives)) * rows.is_positive
        count = rows.is_positive.sum()
        return Terms(terms.sum() / count, torch.ones_like(count)) if self.local else Terms(terms.sum(), count)
"""


@pytest.fixture
def own_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "local_mean.py").write_text(LOCAL_MEAN)
    monkeypatch.syspath_prepend(tmp_path)
    return "local_mean:LocalMean"


@pytest.mark.parametrize(
    "settings",
    [
        ["train.micro_batch=4"],  # two losses, a learned temperature, a momentum encoder
        ["loss={name: triplet, miner: semi_hard, normalize: false}", "data.batch=12", "train.momentum=0"],
        ["loss={name: sup_con}", "data.per_class=null", "encoder.dropout=0.5", "train.momentum=0"],
    ],
)
def test_registered_losses_are_exact(nearfar: Nearfar, config_file: Path, settings: list[str]) -> None:
    answer = nearfar("check", config_file, "--exact", "--json", *(x for s in settings for x in ("--set", s)))
    assert answer.code == 0, answer
    found = json.loads(answer.out)["exact"]
    assert found["exact"]
    assert found["records"] % 4 == 2  # an odd number of pairs: the ranks' shares are uneven
    assert found["value"] > 0
    for name, agreement in found["agreements"].items():
        assert agreement["relative_error"] < 1e-9, name
        assert agreement["cosine"] == pytest.approx(1, abs=1e-12), name
    assert ("loss gradient" in found["agreements"]) == ("train.micro_batch=4" in settings)


def test_a_loss_of_ones_own_is_measured(nearfar: Nearfar, config_file: Path, own_loss: str) -> None:
    answer = nearfar("check", config_file, "--exact", "--set", f"loss={{name: '{own_loss}', local: false}}")
    assert answer.code == 0, answer
    assert "encoder gradient" in answer.out
    assert "loss gradient" in answer.out
    assert "no relative error is above 1e-06" in answer.out


def test_a_mean_over_a_ranks_own_terms_is_found_out(nearfar: Nearfar, config_file: Path, own_loss: str) -> None:
    answer = nearfar("check", config_file, "--exact", "--json", "--set", f"loss={{name: '{own_loss}'}}")
    assert answer.code == 1, answer
    found = json.loads(answer.out)["exact"]
    assert not found["exact"]
    assert found["agreements"]["encoder gradient"]["relative_error"] > 1e-3
