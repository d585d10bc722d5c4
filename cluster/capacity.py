"""Whether the nodes of a cluster have room for the workers of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.schema import Cluster


def refuse_too_small(
    nodes: Sequence[Mapping[str, float]], cluster: Cluster, *, reserved: Mapping[str, float] | None = None
) -> None:
    """Raise RuntimeError unless the least number of workers fits, each on one node. `nodes`: what each has, by kind.

    `reserved`: what a driver takes of one node besides.
    """
    least, needs = cluster.least_workers, {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    left = [dict(node) for node in nodes]
    for node in left:
        if reserved and all(node.get(kind, 0) >= n for kind, n in reserved.items()):
            node.update({kind: node.get(kind, 0) - n for kind, n in reserved.items()})
            break
    if sum(places(node, needs, least) for node in left) >= least:
        return
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in needs}
    wanted = " and ".join(f"{n:g} {kind}s" for kind, n in needs.items() if n)
    have = " and ".join(f"{n:g} {kind}s" for kind, n in total.items() if needs[kind])
    raise RuntimeError(
        f"the cluster is too small for cluster.workers={cluster.workers}: {least} of them need {wanted} each, on one node, "
        f"where {len(nodes)} nodes have {have} together; lower cluster.workers"
    )


def places(node: Mapping[str, float], needs: Mapping[str, float], most: int) -> int:
    """How many workers, `most` at most, fit on a node."""
    return min(most, *(int(node.get(kind, 0) / n + 1e-9) for kind, n in needs.items() if n))
