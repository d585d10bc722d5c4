"""Two ranks that share the GPU, joined by gloo as NCCL wants a GPU for each: no tensor is left on the wrong side."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import Encoder
from tests.distributed import test_families as families
from tests.distributed import test_objective as rows
from tests.gpu.card import CARD, needs_card
from tests.ranks import run_ranks
from tests.trainer.oracle_batch import STEP
from trainer import collectives
from trainer.centres import Centres
from trainer.encoders import build_encoder
from trainer.objective import build_objective

pytestmark = needs_card
Found = list[tuple[float, Tensor, dict[str, Tensor]]]


def of_rows() -> Found:
    """Value, gradient of this rank's rows and of what the loss learns, for every loss over rows."""
    x, ids = rows.global_batch()
    border = rows.cuts(collectives.world())
    part = slice(border[collectives.rank()], border[collectives.rank() + 1])
    local = {name: tensor[part].to(CARD) for name, tensor in ids.items()}
    local["record"] = local["record"] - local["record"].min()
    found = []
    for _, _, _, objective in rows.objectives():
        mine = x[part].to(CARD, copy=True).requires_grad_()
        value, _ = objective.to(CARD)(mine, **local, step=STEP)
        value.backward()
        grads = {name: p.grad.cpu() for name, p in objective.named_parameters() if p.grad is not None}
        found.append((float(value.detach()), mine.grad.cpu() / collectives.world(), grads))
    return found


def of_families() -> Found:
    """The same for losses of given records, targets and class centres, the last also sharded."""
    x, _, target = families.global_batch()
    part, ids = families.local_part()
    local = {name: tensor.to(CARD) for name, tensor in ids.items()}
    found = []
    for name, options, more in families.cases():
        objective = families.build(name, options, **more).to(CARD)
        mine = x[part].to(CARD, copy=True).requires_grad_()
        about = {**local, "target": target[part].to(CARD)} if (name, options) in families.TARGETS else local
        value, _ = objective(mine, **about)
        value.backward()
        loss = objective.loss
        whole = loss.gather_rows if isinstance(loss, Centres) and loss.sharded else lambda grad: grad
        grads = {key: whole(p.grad).cpu() for key, p in loss.named_parameters() if p.grad is not None}
        found.append((float(value.detach()), mine.grad.cpu() / collectives.world(), grads))
    return found


def assert_same(ranks: list[Found], alone: Found) -> None:
    for case, (value, grad, learned) in enumerate(alone):
        assert_near(torch.cat([rank[case][1] for rank in ranks]), grad)
        for rank in ranks:
            torch.testing.assert_close(rank[case][0], value, rtol=1e-9, atol=0.0)
            assert rank[case][2].keys() == learned.keys()
            for name, expected in learned.items():
                assert_near(rank[case][2][name], expected)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-8


def test_losses_over_rows() -> None:
    assert_same(run_ranks(2, of_rows), rows.every_case())


def test_losses_of_records_targets_and_centres() -> None:
    assert_same(run_ranks(2, of_families), families.every_case())


def gradients() -> list[Tensor]:
    """Of an encoder whose images are shared out, after DDP."""
    torch.manual_seed(0)
    part = {"name": "convnet", "dim": 8, "patch": 2, "widths": [8], "blocks": 1, "grid": 2}
    encoder = collectives.data_parallel(build_encoder(Encoder.model_validate(part), 8).double().to(CARD))
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows_each = 12 // collectives.world()
    own = slice(rows_each * collectives.rank(), rows_each * (collectives.rank() + 1))
    group = torch.arange(12)[own].to(CARD) // 3
    value, _ = build_objective({"name": "sup_con"})(encoder(images[own].to(CARD)), group)
    value.backward()
    return [p.grad.cpu() for p in encoder.parameters() if p.grad is not None]


def test_the_encoder_gets_the_gradient_of_one_process() -> None:
    one = gradients()
    assert len(one) > 5
    for found in run_ranks(2, gradients):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12)
