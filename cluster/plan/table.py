"""The plan as text, at most 100 columns wide: a column for each number of GPUs, a sentence for each below."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from cluster.plan.advice import advice
from cluster.plan.budget import Budget
from cluster.plan.scale import Assumptions, Facts, Scale

WIDTH, LABEL, COLUMN = 100, 44, 11
AT_ONCE = (WIDTH - LABEL) // COLUMN

Line = tuple[str, Callable[[Scale, Budget], str]]


def describe(facts: Facts, given: Assumptions, plans: Sequence[tuple[Scale, Budget]]) -> str:
    """Head, tables of a few columns, and what limits each."""
    parts = [*_head(facts, given)]
    for first in range(0, len(plans), AT_ONCE):
        parts += ["", *_table(facts, given, plans[first : first + AT_ONCE])]
    parts.append("")
    for scale, _ in plans:
        parts += _wrapped(f"{scale.world} GPUs. {_capital(advice(scale, facts))}")
    return "\n".join(parts)


def number(value: float) -> str:
    """Three digits that count, with thousands set apart."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _head(facts: Facts, given: Assumptions) -> list[str]:
    config, data, encoder, gpu = facts.config, facts.data, facts.encoder, given.gpu
    peak = gpu.fp32_tflops if config.train.precision == "fp32" else gpu.bf16_tflops
    images = data.images_per_record
    labelled = data.kind == "labelled"
    batch = f"{config.data.batch:,} {'images' if labelled else data.kind.replace('_', ' ') + 's'}"
    rate = "measured here" if data.measured else "assumed"
    between = f", {given.links.between * 8e-9:,.0f} Gbit/s out of a node of {given.links.gpus_per_node}"
    lines = [
        f"{config.name}: {data.num_records:,} {data.kind} records, {data.record_bytes / 1000 / images:,.0f} KB an image; "
        f"batch {batch}" + ("" if labelled else f" = {config.data.batch * images:,.0f} images"),
        f"encoder {encoder.name} ({encoder.source}): {encoder.parameters / 1e6:.1f} M parameters, "
        f"{encoder.forward_flops / 1e9:.3g} GFLOP an image and forward pass, "
        f"{encoder.kept_bytes / 1e6:.3g} MB of an image kept for backward",
        f"assumed: {gpu.name} with {gpu.memory_gb:,.3g} GB and {peak:,.3g} TFLOP/s in {config.train.precision}, of which it "
        f"reaches {given.mfu:.2g} (--mfu); {given.links.inside * 8e-9:,.0f} Gbit/s between GPUs{between}; a core decodes "
        f"{data.decode_rate:,.0f} images/s ({rate})",
    ]
    return [line for text in lines for line in _wrapped(text)]


def _table(facts: Facts, given: Assumptions, plans: Sequence[tuple[Scale, Budget]]) -> list[str]:
    rows = ["".join(["GPUs".ljust(LABEL), *(f"{scale.world:,}".rjust(COLUMN) for scale, _ in plans)]), "-" * WIDTH]
    for label, cell in [*_memory_lines(facts), *_wire_lines(plans), *_time_lines(), *_data_lines(given), *_budget_lines(plans)]:
        rows.append("".join([label.ljust(LABEL), *(cell(*plan).rjust(COLUMN) for plan in plans)]).rstrip())
    return rows


def _memory_lines(facts: Facts) -> list[Line]:
    what = "images" if facts.data.kind == "labelled" else "records"
    return [
        (f"{what} of a step on a GPU", lambda s, b: f"{s.share.records:,}"),
        (f"{what} encoded at once (train.micro_batch)", _piece),
        ("memory of a GPU at its peak, GB", lambda s, b: number(s.memory.total / 1e9)),
        ("  weights, gradients, moments", lambda s, b: number(s.memory.weights / 1e9)),
        ("  activations", lambda s, b: number(s.memory.activations / 1e9)),
        ("  loss", lambda s, b: number(s.memory.loss / 1e9)),
        ("  images", lambda s, b: number(s.memory.images / 1e9)),
        ("  libraries, fragments", lambda s, b: number(s.memory.other / 1e9)),
        ("host memory for a GPU's batches, GB", lambda s, b: number(s.memory.host / 1e9)),
    ]


def _piece(scale: Scale, _: Budget) -> str:
    if scale.micro_batch is None:
        return "none fits"
    return "all" if scale.micro_batch == scale.share.records else f"{scale.micro_batch:,}"


def _wire_lines(plans: Sequence[tuple[Scale, Budget]]) -> list[Line]:
    names = dict.fromkeys(name for scale, _ in plans for name in scale.sent)
    large = [n for n in names if any(s.sent.get(n, 0) > 0.005 * sum(s.sent.values()) for s, _ in plans)]
    total: Line = ("sent by a GPU in a step, MB", lambda s, b: number(sum(s.sent.values()) / 1e6))
    return [total, *((f"  {name}", _sent(name)) for name in large)]


def _sent(name: str) -> Callable[[Scale, Budget], str]:
    return lambda s, b: number(s.sent.get(name, 0) / 1e6)


def _time_lines() -> list[Line]:
    return [
        ("a step, s", lambda s, b: number(s.times.step)),
        ("  encoder", lambda s, b: number(s.times.encoder)),
        ("  loss", lambda s, b: number(s.times.loss)),
        ("  links, not hidden behind backward", lambda s, b: number(s.times.waiting)),
        ("images/s", lambda s, b: f"{s.images_per_s:,.0f}"),
    ]


def _data_lines(given: Assumptions) -> list[Line]:
    limit = "" if given.storage_bytes_s is None else f" (limit {given.storage_bytes_s / 1e9:,.3g})"
    return [
        (f"read by all nodes, GB/s{limit}", lambda s, b: number(s.read_bytes_s / 1e9)),
        ("  requests/s", lambda s, b: number(s.requests_s)),
        ("  times that each byte is fetched", lambda s, b: f"{s.amplification:.3f}"),
        ("shuffle pool on a node's disk, GB", lambda s, b: number(s.pool_bytes / 1e9)),
        ("cores that decode for a GPU", lambda s, b: number(s.decode_cores)),
    ]


def _budget_lines(plans: Sequence[tuple[Scale, Budget]]) -> list[Line]:
    lines: list[Line] = [
        ("an epoch, h", lambda s, b: number(b.epoch_h)),
        (f"the run ({plans[0][1].steps:,} steps), h", lambda s, b: number(b.run_h)),
        ("  GPU hours", lambda s, b: number(b.gpu_h)),
    ]
    if plans[0][1].cost is not None:
        lines.append(("  cost", lambda s, b: number(b.cost or 0.0)))
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
