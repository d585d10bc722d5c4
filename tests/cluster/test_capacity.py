"""Whether workers fit, each on one node."""

from __future__ import annotations

import pytest

from cluster.capacity import refuse_too_small
from configs.schema import Cluster


def fits(nodes: list[dict[str, float]], reserved: dict[str, float] | None = None, **cluster: object) -> bool:
    try:
        refuse_too_small(nodes, Cluster.model_validate(cluster), reserved=reserved)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    ("nodes", "cluster", "found"),
    [
        ([{"CPU": 2}], {"workers": 2}, True),
        ([{"CPU": 2}], {"workers": 3}, False),
        ([{"CPU": 2}], {"workers": (2, 8)}, True),
        ([{"CPU": 6}] * 4, {"workers": 2, "cpus_per_worker": 8}, False),  # 24 CPUs, but no node has 8
        ([{"CPU": 8}, {"CPU": 9}], {"workers": 2, "cpus_per_worker": 8}, True),
        ([{"CPU": 64, "GPU": 8}], {"workers": 8, "gpus_per_worker": 1}, True),
        ([{"CPU": 64}], {"workers": 1, "gpus_per_worker": 1}, False),
        ([{"CPU": 0.3}], {"workers": 3, "cpus_per_worker": 0.1}, True),
        ([], {"workers": 1}, False),
    ],
)
def test_workers_fit_on_nodes(nodes: list[dict[str, float]], cluster: dict[str, object], found: bool) -> None:
    assert fits(nodes, **cluster) is found


def test_the_driver_takes_its_share_of_one_node() -> None:
    assert fits([{"CPU": 4}], {"CPU": 2}, workers=2)
    assert not fits([{"CPU": 4}], {"CPU": 3}, workers=2)
    assert fits([{"CPU": 1}, {"CPU": 2}], {"CPU": 1}, workers=2)
