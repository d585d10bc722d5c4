"""Row losses on batches with nothing to compare, or nothing to tell apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.objective import build_objective

MINERS = ["all", "batch_hard", "semi_hard", "semi_hard_within_margin", "hardest", "random_hard", "distance_weighted"]
LOSSES: list[dict[str, Any]] = [
    *({"name": "triplet", "miner": miner} for miner in MINERS),
    {"name": "triplet", "miner": "semi_hard_within_margin", "pick": "random", "pairs": "unordered"},
    {"name": "triplet", "miner": "all", "soft": True, "distance": "squared_euclidean"},
    *({"name": "contrastive", "balance": balance} for balance in ("none", "sample", "hardest")),
    {"name": "contrastive", "legacy": True},
    *({"name": "margin", "miner": miner} for miner in ("all", "distance_weighted")),
    *({"name": "max_margin", "over": over} for over in ("sum", "hardest")),
    *({"name": name} for name in ("sigmoid", "multi_similarity", "recall_at_k", "circle", "lifted_structure")),
]
WITHOUT_POSITIVES = ("contrastive", "margin", "sigmoid")  # these push negatives apart all the same


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(str(v) for v in loss.values()))
@pytest.mark.parametrize(
    "case", ["zero", "identical", "one class", "all invalid", "every image its own class", "bf16", "fp16", "single row"]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_degenerate_batches_give_a_finite_loss_and_gradient(loss: dict[str, Any], case: str, normalize: bool) -> None:
    torch.manual_seed(0)
    n = 1 if case == "single row" else 12
    x, group, valid = torch.randn(n, 8), torch.arange(n) // 3, torch.ones(n, dtype=torch.bool)
    if case == "zero":
        x.zero_()
    elif case == "identical":
        x[:] = x[0]
    elif case == "one class":
        group.zero_()
    elif case == "all invalid":
        valid[:] = False
    elif case == "every image its own class":
        group = torch.arange(n)
    elif case in ("bf16", "fp16"):
        x = x.to({"bf16": torch.bfloat16, "fp16": torch.float16}[case])
    x.requires_grad_()
    value, stats = build_objective({**loss, "normalize": normalize})(x, group, valid=valid)
    value.backward()
    assert torch.isfinite(value)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.dtype == x.dtype
    assert all(torch.isfinite(number) for number in stats.values())
    nothing = case in ("all invalid", "single row")
    if nothing or (case == "every image its own class" and loss["name"] not in WITHOUT_POSITIVES):
        assert float(value.detach()) == 0
        assert not x.grad.any()
