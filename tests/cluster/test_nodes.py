"""Where the ranks are, and over which interface they talk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster import interfaces
from cluster.nodes import Node, describe, nodes_of_ranks, oddities
from tests.conftest import Answer
from tests.ranks import run_ranks

A, B, SMALL = Node("a", "64 x fast"), Node("b", "64 x fast"), Node("c", "32 x slow")


def test_nodes_are_counted_in_the_order_of_ranks() -> None:
    assert describe([A] * 8 + [B] * 8) == "a x 8, b x 8"
    assert oddities([A] * 8 + [B] * 8) == []


def test_torn_and_unlike_nodes_are_told() -> None:
    assert describe([A, B, A]) == "a x 1, b x 1, a x 1"
    (torn,) = oddities([A, B, A])
    assert torn.startswith("the ranks of a are not neighbours")
    (unlike,) = oddities([A, SMALL])
    assert "a: 64 x fast; c: 32 x slow" in unlike


def names() -> list[str]:
    rank = torch.distributed.get_rank()
    return [node.name for node in nodes_of_ranks(f"ü-{rank}" + "x" * 100 * rank, torch.device("cpu"))]


@pytest.mark.acceptance
def test_every_rank_learns_the_names_of_all() -> None:
    assert run_ranks(2, names) == [["ü-0", "ü-1" + "x" * 77]] * 2


def test_one_process_is_a_node() -> None:
    (node,) = nodes_of_ranks("me", torch.device("cpu"))
    assert node.name == "me"
    assert node.cpu.startswith(f"{os.cpu_count()} x ")


def test_an_unknown_interface_is_refused_with_those_there_are(nearfar: Callable[..., Answer], config_file: Path) -> None:
    answer = nearfar("train", config_file, "--local", "--set", "cluster.interface=nosuch0")
    assert answer.code == 2
    assert "cluster.interface: there is no 'nosuch0' here, but " in answer.err
    assert "lo" in answer.err.partition("but")[2]
    assert not (config_file.parent / "runs" / "small").exists()


def test_gloo_and_nccl_are_told_of_the_interface() -> None:
    assert interfaces.environment("lo") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert interfaces.environment(None) == {}
