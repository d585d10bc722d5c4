"""Edge cases of the objective in one process, and its options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer.objective import build_objective, unit

NAMES = ["info_nce", "sup_con", "triplet"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case", ["zero", "identical", "one class", "all invalid", "every image its own class", "bf16", "fp16", "single row"]
)
def test_degenerate_batches_give_a_finite_loss_and_gradient(name: str, case: str) -> None:
    torch.manual_seed(0)
    n = 1 if case == "single row" else 12
    x = torch.randn(n, 8)
    group, valid = torch.arange(n) // 3, torch.ones(n, dtype=torch.bool)
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
    options = {"temperature": 0.01} if name != "triplet" else {"miner": "batch_hard"}
    loss, stats = build_objective({"name": name, **options})(x, group, valid=valid)
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.dtype == x.dtype
    assert all(torch.isfinite(value) for value in stats.values())
    if case in ("all invalid", "every image its own class", "single row"):
        assert float(loss.detach()) == 0
        assert not x.grad.any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_over_pairs_is_clips_cross_entropy(symmetric: bool) -> None:
    left, right = torch.randn(2, 10, 6, dtype=torch.float64)
    x = torch.stack([left, right], 1).flatten(0, 1).requires_grad_()
    record, view = torch.arange(20) // 2, torch.arange(20) % 2
    objective = build_objective(
        {"name": "info_nce", "queries": "anchors", "candidates": "other_view", "symmetric": symmetric, "temperature": 0.1}
    )
    loss, _ = objective(x, record, view=view, record=record)
    logits = F.normalize(left) @ F.normalize(right).T / 0.1
    expected = F.cross_entropy(logits, torch.arange(10))
    if symmetric:
        expected = (expected + F.cross_entropy(logits.T, torch.arange(10))) / 2
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)


def test_vectors_too_short_for_16_bits_get_unit_length() -> None:
    x = torch.full((1, 4), 1e-4, dtype=torch.float16).requires_grad_()  # squares below the smallest number of fp16
    found = unit(x)
    found[0, 0].backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), torch.full((1, 4), 0.5), rtol=1e-6, atol=0)
    assert x.grad is not None
    assert float(x.grad[0, 0]) > 0


def test_the_chunk_size_changes_nothing() -> None:
    x, group = torch.randn(50, 7, dtype=torch.float64), torch.arange(50) // 4
    found = []
    for chunk_bytes in (1, 5000, 2**30):
        leaf = x.clone().requires_grad_()
        loss, _ = build_objective({"name": "sup_con", "chunk_bytes": chunk_bytes})(leaf, group)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-10, atol=1e-14)


def test_a_pair_that_does_not_match_is_a_negative_and_never_a_positive() -> None:
    x = F.normalize(torch.randn(8, 4, dtype=torch.float64))
    record, view = torch.arange(8) // 2, torch.arange(8) % 2
    match = torch.tensor([1, 0, 1, 0])
    loss, stats = build_objective({"name": "info_nce", "temperature": 0.5})(x, record, view=view, record=record, match=match)
    terms = []
    for a in range(8):
        if match[record[a]]:
            others = [i for i in range(8) if record[i] != record[a]]
            logits = torch.stack([x[a] @ x[a ^ 1], *(x[a] @ x[i] for i in others)]) / 0.5
            terms.append(logits.logsumexp(0) - logits[0])
    assert float(stats["num_terms"]) == 4
    assert float(loss) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "infonce"}, "did you mean 'info_nce'"),
        ({"name": "triplet", "margn": 1}, "did you mean 'margin'"),
        ({"name": "triplet", "chunk_bytes": 0}, "chunk_bytes"),
        ({"name": "info_nce", "temperature": 0}, "temperature"),
        ({"name": "info_nce", "queries": "some"}, "loss.queries"),
    ],
)
def test_a_wrong_option_is_named(loss: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(loss)


def test_shapes_that_do_not_fit_are_named() -> None:
    objective = build_objective({"name": "sup_con"})
    with pytest.raises(ValueError, match="group: expected shape"):
        objective(torch.randn(4, 2), torch.arange(3))
    with pytest.raises(ValueError, match="need `view`"):
        build_objective({"name": "info_nce", "candidates": "other_view"})(torch.randn(4, 2), torch.arange(4))
