"""One plain sentence: what limits a run on so many GPUs, and what to change."""

from __future__ import annotations

import math

from cluster.plan.scale import Facts, Scale

NEARLY_ALL = 0.9  # of a step that is arithmetic: more GPUs make it shorter
TOO_MUCH_READ = 1.15


def limit_of(scale: Scale) -> str:
    """memory, storage, decoding, compute, loss or links: what a step is longest for."""
    times = scale.times
    if scale.micro_batch is None:
        return "memory"
    if times.step > times.encoder + times.loss + times.waiting:
        return "storage" if times.storage >= times.decoding else "decoding"
    parts = {"compute": times.encoder, "loss": times.loss, "links": times.waiting}
    return max(parts, key=lambda name: parts[name])


def advice(scale: Scale, facts: Facts) -> str:
    """What limits it, with numbers, and the setting or the purchase that helps."""
    words = {
        "memory": _memory,
        "storage": _storage,
        "decoding": _decoding,
        "compute": _compute,
        "loss": _loss,
        "links": _links,
    }[limit_of(scale)](scale, facts)
    if scale.micro_batch is not None and not scale.asked:
        words += f"; it fits with train.micro_batch: {scale.micro_batch}"
    if scale.amplification > TOO_MUCH_READ:
        words += _lanes(scale, facts)
    return f"{words}."


def _lanes(scale: Scale, facts: Facts) -> str:
    lanes = facts.config.data.lanes
    better = math.ceil(lanes / scale.nodes) * scale.nodes
    change = f"set data.lanes: {better} before the first step" if better != lanes else "lower data.block_mb"
    return f"; {scale.nodes} nodes fetch each byte {scale.amplification:.2g} times: {change}"


def _memory(scale: Scale, facts: Facts) -> str:
    shares = {
        "weights, gradients and moments": scale.memory.weights,
        "activations": scale.memory.activations,
        "the loss": scale.memory.loss,
        "the step's images": scale.memory.images,
    }
    largest = max(shares, key=lambda name: shares[name])
    help_ = {
        "weights, gradients and moments": "take a smaller encoder or a GPU with more memory",
        "activations": "set encoder.checkpointing: true or lower data.image_size",
        "the loss": "lower data.batch, encoder.dim or loss.memory, or set loss.chunk_bytes",
        "the step's images": "take more GPUs or lower data.batch",
    }[largest]
    return (
        f"memory: {scale.memory.total / 1e9:.3g} GB of {scale.have_bytes / 1e9:.3g} GB with the smallest micro-batch, most "
        f"of it for {largest}; {help_}"
    )


def _storage(scale: Scale, facts: Facts) -> str:
    return (
        f"storage: it gives the bytes of a step in {scale.times.storage:.2g} s, the GPUs would need them in "
        f"{_gpu_s(scale):.2g} s; pack with --max-side or --quality, or keep the data in every node's data.cache"
    )


def _decoding(scale: Scale, facts: Facts) -> str:
    needed = math.ceil(scale.share.images / facts.data.decode_rate / _gpu_s(scale))
    return f"decoding: {needed} cores a GPU would keep up; pack with --max-side, or take machines with more cores"


def _compute(scale: Scale, facts: Facts) -> str:
    part = scale.times.encoder / scale.times.step
    words = f"compute: {100 * part:.0f} % of a step"
    if part > NEARLY_ALL:
        words += ", so more GPUs help in proportion"
    else:
        words += f", {100 * scale.times.waiting / scale.times.step:.0f} % waits for links"
    train = facts.config.train
    if train.precision == "fp32":
        words += "; train.precision: bf16 is several times faster"
    elif scale.micro_batch is not None and scale.micro_batch < scale.share.records and not train.reproducible:
        words += "; a quarter of it is the second forward pass of micro-batches, which GPUs with a smaller share do without"
    return words


def _loss(scale: Scale, facts: Facts) -> str:
    return (
        f"the loss: its fp32 products take {100 * scale.times.loss / scale.times.step:.0f} % of a step; lower encoder.dim or "
        "data.batch"
    )


def _links(scale: Scale, facts: Facts) -> str:
    largest = max(scale.sent, key=lambda name: scale.sent[name])
    words = f"links: {100 * scale.times.waiting / scale.times.step:.0f} % of a step waits, mostly for {largest}; "
    if largest == "vectors" and any(loss.wire_size > 2 for loss in facts.losses) and not facts.config.train.reproducible:
        return words + "set loss.wire: bf16"
    change = "raise data.batch" if largest == "gradients" else "lower encoder.dim"
    return f"{words}{change}, or use fewer GPUs or faster links"


def _gpu_s(scale: Scale) -> float:
    return scale.times.encoder + scale.times.loss + scale.times.waiting
