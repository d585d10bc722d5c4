"""Real Ray nodes on this machine, each a raylet with an address of its own, behind a token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT


@dataclass(frozen=True, slots=True)
class Host:
    """An address, what to put before a command to run it there, and the network interface that leads to the others."""

    address: str
    prefix: tuple[str, ...] = ()
    interface: str = "lo"


@dataclass(frozen=True, slots=True)
class Nodes:
    """The processes of the nodes, the addresses of the cluster and its dashboard, and the environment of its clients."""

    address: str
    dashboard: str
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]]

    @property
    def head(self) -> subprocess.Popen[bytes]:
        return self.processes[0]

    @property
    def other(self) -> subprocess.Popen[bytes]:
        return self.processes[1]


def can_make_namespaces() -> bool:
    made = shutil.which("ip") and subprocess.run(["ip", "netns", "add", "nearfar-try"], capture_output=True).returncode == 0
    return bool(made) and subprocess.run(["ip", "netns", "delete", "nearfar-try"]).returncode == 0


@contextmanager
def hosts(where: str) -> Iterator[list[Host]]:
    """Two: `addresses` of this machine, or network `namespaces` with a cable between them."""
    if where == "addresses":
        yield [Host("127.0.0.2"), Host("127.0.0.3")]
        return
    word = secrets.token_hex(3)
    names, ends = [f"nearfar-{word}-{i}" for i in range(2)], [f"nf{word}{i}" for i in range(2)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "cable")
            ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield [Host(f"10.77.0.{i + 1}", ("ip", "netns", "exec", name), "cable") for i, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, found: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@contextmanager
def ray_nodes(*, hosts: list[Host], cpus: int = 1, dashboard: bool = False) -> Iterator[Nodes]:
    """A node on every host, the head on the first. Stopped by the processes that were started here, and nothing else."""
    folder = tempfile.mkdtemp(prefix="nf", dir="/tmp")  # a socket's path must be short
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": folder,
        "GLOO_SOCKET_IFNAME": hosts[0].interface,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, web = free_port(), free_port()
    page = [f"--include-dashboard={str(dashboard).lower()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={web}"]
    address = f"{hosts[0].address}:{port}"
    processes = [_node(hosts[0], environment, cpus, "--head", f"--port={port}", *page)]
    try:
        time.sleep(6)
        processes += [_node(host, environment, cpus, f"--address={address}") for host in hosts[1:]]
        if dashboard:
            wait_for("the dashboard", lambda: listens("127.0.0.1", web))
        time.sleep(6)
        yield Nodes(address, f"http://127.0.0.1:{web}", environment, processes)
    finally:
        for process in reversed(processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _node(host: Host, environment: dict[str, str], cpus: int, *arguments: str) -> subprocess.Popen[bytes]:
    ray = Path(sys.executable).with_name("ray")
    command = [*host.prefix, str(ray), "start", "--block", f"--num-cpus={cpus}", f"--node-ip-address={host.address}"]
    return subprocess.Popen(
        [*command, f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", *arguments],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def listens(host: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((host, port), timeout=1).close()
        return True
    return False
