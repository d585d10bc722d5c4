"""The network interface over which workers talk."""

from __future__ import annotations

import os
import socket


def environment(interface: str | None) -> dict[str, str]:
    """What gloo and NCCL read before a process group is made."""
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def use(interface: str | None) -> None:
    """In this process, from now on."""
    os.environ.update(environment(interface))


def refuse_unknown(interface: str | None) -> None:
    """Raise ValueError unless this machine has it."""
    names = [name for _, name in socket.if_nameindex()]
    if interface is not None and interface not in names:
        raise ValueError(
            f"cluster.interface: there is no {interface!r} here, but {', '.join(sorted(names))}; null leaves it to gloo "
            "and NCCL"
        )
