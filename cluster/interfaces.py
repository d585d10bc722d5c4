"""The network interface over which workers talk."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection


def environment(interface: str | None) -> dict[str, str]:
    """What gloo and NCCL read before a process group is made."""
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def use(interface: str | None) -> None:
    """In this process, from now on."""
    os.environ.update(environment(interface))


def refuse_unknown(interface: str | None, have: Collection[str] | None = None, where: str = "here") -> None:
    """Raise ValueError unless a machine has it; `have`: the interfaces of another one."""
    names = here() if have is None else have
    if interface is not None and interface not in names:
        raise ValueError(
            f"cluster.interface {interface!r} does not exist {where}; there are {', '.join(sorted(names))}; null leaves the "
            "choice to gloo and NCCL"
        )


def here() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def refuse_unknown_on_nodes(interface: str | None) -> None:
    """Raise ValueError unless every node of the Ray cluster that can hold a worker has it."""
    if interface is None:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(here)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    asked = {
        node["NodeManagerAddress"]: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }
    for address, answer in asked.items():
        refuse_unknown(interface, ray.get(answer, timeout=120), f"on node {address}")
