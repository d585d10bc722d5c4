"""Bytes that gloo ranks put on the wire in a step, read off the counter of a network namespace that nobody else is in."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from cluster.plan.scale import Facts
from tests.distributed.test_plan_wire import Case, stepper
from tests.ranks import run_ranks

STEPS = 10
LARGE = (("dim", 1024), ("widths", [64, 128]), ("patch", 1))  # so that headers and acknowledgements hardly count
CASES = {
    "DDP": Case({"name": "info_nce"}, encoder=LARGE),
    "reproducible": Case({"name": "info_nce"}, train=(("reproducible", True), ("micro_batch", 10)), encoder=LARGE),
    "given pairs": Case({"name": "contrastive"}, kind="labelled_pair", encoder=LARGE),
}


def transmitted() -> int:
    """Bytes that the loopback of this namespace has sent so far, headers and acknowledgements included."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def step_bytes(case: Case, facts: Facts) -> float:
    """Of all ranks, once DDP has ordered its buckets."""
    step, _ = stepper(case, facts)
    for number in (1, 2, 3):
        step(number)
    dist.barrier()
    before = transmitted()
    dist.barrier()
    for number in range(STEPS):
        step(number + 4)
    dist.barrier()
    return (transmitted() - before) / STEPS


def main() -> None:
    found: dict[str, dict[int, float]] = {}
    for name, case in CASES.items():
        facts = case.facts()
        found[name] = {world: min(run_ranks(world, step_bytes, case, facts)) for world in (2, 4)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
