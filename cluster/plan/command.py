"""From a config and options to plans, as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.check import open_training
from cluster.paths import absolute
from cluster.plan.advice import advice, limit_of
from cluster.plan.budget import Budget, budget
from cluster.plan.facts import Told, data_facts, encoder_facts, loss_facts
from cluster.plan.gpus import gpu_named
from cluster.plan.scale import Assumptions, Facts, Scale, plan_for
from cluster.plan.table import describe
from cluster.plan.wire import Links
from cluster.towers import with_input_dim
from configs.load import load_config
from configs.schema import RunConfig
from pipelines.records import KINDS

BYTES_S = 1e9 / 8  # of a Gbit/s


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; see `cluster.plan_commands`."""

    told: Told
    gpu: str = "h100"
    encoder: str | None = None
    mfu: float = 0.4
    link_gbps: float | None = None
    node_gbps: float = 400.0
    gpus_per_node: int = 8
    storage_gb_s: float | None = None
    cores_per_gpu: float | None = None
    decode_rate: float | None = None
    price: float | None = None


def run_plan(path: Path, overrides: Sequence[str], world: str, options: Options) -> tuple[dict[str, Any], str]:
    """The result for `--json` and the text. Raises ValueError that names the option or the setting."""
    worlds = _worlds(world)
    # `cluster.workers` of the config says nothing here, and must not be refused for a small batch.
    config = absolute(load_config(path, [*overrides, "cluster.workers=1"]))
    facts, given = facts_of(config, options), assumptions(options)
    plans = []
    for one in worlds:
        scale = plan_for(one, facts, given)
        plans.append((scale, budget(scale, facts, options.price)))
    result = {
        "config": str(path),
        "data": asdict(facts.data),
        "encoder": asdict(facts.encoder),
        "losses": [asdict(loss) for loss in facts.losses],
        "assumed": asdict(given),
        "plans": [_as_dict(scale, cost, facts) for scale, cost in plans],
    }
    return result, describe(facts, given, plans)


def facts_of(config: RunConfig, options: Options) -> Facts:
    """What is the same on any number of GPUs."""
    if options.told.kind not in KINDS:
        raise ValueError(f"--kind {options.told.kind}: one of {', '.join(KINDS)}")
    data = data_facts(config, options.told, options.decode_rate)
    with suppress(ValueError):  # the data need not be there
        config = with_input_dim(config, open_training(config))
    encoder = encoder_facts(config, options.encoder)
    return Facts(config, data, encoder, loss_facts(config, data, encoder.dim, cpu=options.gpu == "cpu"))


def assumptions(options: Options) -> Assumptions:
    gpu = gpu_named(options.gpu)
    inside = gpu.link_gb_s * 1e9 if options.link_gbps is None else options.link_gbps * BYTES_S
    return Assumptions(
        gpu=gpu,
        links=Links(inside, options.node_gbps * BYTES_S, options.gpus_per_node),
        mfu=options.mfu,
        storage_bytes_s=None if options.storage_gb_s is None else options.storage_gb_s * 1e9,
        cores_per_gpu=options.cores_per_gpu,
    )


def _worlds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--world {text}: numbers of GPUs are meant, for instance --world 8,64,1024")
    return found


def _as_dict(scale: Scale, cost: Budget, facts: Facts) -> dict[str, Any]:
    more = {"fits": scale.micro_batch is not None, "limit": limit_of(scale), "advice": advice(scale, facts)}
    memory = {**asdict(scale.memory), "total": scale.memory.total}
    times = {**asdict(scale.times), "waiting": scale.times.waiting, "step": scale.times.step}
    return {**asdict(scale), "memory": memory, "times": times, **asdict(cost), **more}
