"""Time and memory of the losses, as tables: `make bench`, and `NEARFAR_BENCH=full make bench` for all of it.

No time is asserted: machines differ and are shared. What is asserted is that both sides of a comparison compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.benchmarks import cases
from tests.benchmarks.measure import FULL, MIB, THREADS, apart, fastest, table

pytestmark = pytest.mark.benchmark
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none here")

ROUNDS = 8 if FULL else 4
SUP_CON: dict[str, Any] = {"name": "sup_con", "temperature": 0.1}
BATCH_HARD: dict[str, Any] = {"name": "triplet", "miner": "batch_hard", "margin": 0.2}
SEMI_HARD: dict[str, Any] = {"name": "triplet", "miner": "semi_hard", "margin": 0.2}
BATCH_ALL: dict[str, Any] = {"name": "triplet", "miner": "all", "margin": 0.2}
# name, ours, batch, whether the definitions are the same, goals: times faster, share of the memory
PEERS = [
    ("batch_hard", BATCH_HARD, 8192, True, "4x", "1/15"),
    ("sup_con", SUP_CON, 8192, True, "4x", "1/15"),
    ("semi_hard", SEMI_HARD, 4096, False, "7x", "1/15"),  # theirs: every negative inside the margin; ours: the closest beyond
    ("batch_all", BATCH_ALL, 4096, True, "7x", "1/15"),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def test_time_over_three_raw_matrix_products() -> None:
    size = 8192
    losses = {**cases.row_losses(), **cases.plain_losses()}
    functions = {"gemms": cases.gemms(size), **{label: cases.ours(loss, size) for label, loss in losses.items()}}
    functions["sup_con with statistics"] = cases.ours(SUP_CON, size, stats=True)
    seconds = fastest(functions, ROUNDS)
    rows = [(label, f"{s:.2f} s", f"{s / seconds['gemms']:.2f}x") for label, s in seconds.items()]
    title = f"Forward + backward over X X^T, S X and S^T X: B={size}, D={cases.DIM}, {cases.PER_CLASS} per class"
    table(f"{title}, fp32, {THREADS} threads (goal: sup_con 1.4x, others 2.0x)", ["loss", "time", "over GEMMs"], rows)


@pytest.mark.parametrize(("name", "loss", "size", "same", "faster", "smaller"), PEERS, ids=[p[0] for p in PEERS])
def test_against_pytorch_metric_learning(
    name: str, loss: dict[str, Any], size: int, same: bool, faster: str, smaller: str
) -> None:
    pytest.importorskip("pytorch_metric_learning")
    functions = {"ours": cases.ours(loss, size), "theirs": cases.theirs(name, size)}
    if same:
        assert functions["ours"]() == pytest.approx(functions["theirs"](), rel=1e-4)
    seconds = fastest(functions, ROUNDS)
    del functions
    _, mine = apart("ours", loss=loss, size=size)
    _, other = apart("theirs", name=name, size=size)
    table(
        f"{name} at B={size}, D={cases.DIM} against pytorch-metric-learning ({'the same' if same else 'nearest'} definition)",
        ["", "ours", "theirs", "ratio", "goal"],
        [
            (
                "time",
                f"{seconds['ours']:.2f} s",
                f"{seconds['theirs']:.2f} s",
                f"{seconds['theirs'] / seconds['ours']:.1f}x",
                faster,
            ),
            ("peak extra memory", _mib(mine), _mib(other), f"1/{other / mine:.0f}", smaller),
        ],
    )


def test_time_and_memory_grow_with_the_batch() -> None:
    sizes = [1024 * 2**i for i in range(7 if FULL else 6)]
    for label, loss in (("sup_con", SUP_CON), ("triplet batch_hard", BATCH_HARD)):
        rows = []
        for size in sizes:
            seconds, extra = apart("ours", loss=loss, size=size, repeat=3 if size <= 8192 else 1)
            rows.append((f"{size}", f"{seconds:.3f} s", _mib(extra), _mib(_square(size, size))))
        table(
            f"{label}, D={cases.DIM}: goal below 300 MB at B=32768; B x B: similarities and their gradient alone, in fp32",
            ["B", "time", "peak extra memory", "B x B, computed"],
            rows,
        )


def test_one_rank_of_a_large_world() -> None:
    size, rows = 256, []
    for world in (8, 64, 1024):
        for label, loss in (("sup_con", SUP_CON), ("triplet batch_hard", BATCH_HARD)):
            seconds, extra = apart("one_rank", loss=loss, size=size, world=world)
            everyone = size * world
            gathered = everyone * cases.DIM * 4
            rows.append(
                (
                    f"{world}",
                    label,
                    f"{everyone}",
                    f"{seconds:.2f} s",
                    _mib(extra),
                    _mib(gathered),
                    _mib(_square(everyone, everyone)),
                )
            )
    headers = ["ranks", "loss", "global batch", "time", "peak extra memory", "the gathered vectors", "B x B, computed"]
    table(f"One rank of {size} rows against the candidates of all, D={cases.DIM}, without the wire", headers, rows)


@needs_card
def test_on_a_gpu() -> None:
    rows = []
    for size in (8192, 32768, 65536) if FULL else (8192,):
        losses = cases.row_losses() if size <= 32768 else {"sup_con": SUP_CON, "triplet batch_hard": BATCH_HARD}
        functions = {"three products alone": cases.gemms(size, device="cuda")}
        functions |= {label: cases.ours(loss, size, device="cuda") for label, loss in losses.items()}
        extra = {label: _peak(function) for label, function in functions.items()}
        seconds = fastest(functions, 4)
        for label, s in seconds.items():
            times = f"{s / seconds['three products alone']:.1f}x"
            rows.append((label, f"{size}", f"{s * 1000:.1f} ms", times, _mib(extra[label]), _mib(_square(size, size))))
        del functions
    title = f"Forward + backward of a loss on {torch.cuda.get_device_name()}, D={cases.DIM}, {cases.PER_CLASS} per class, fp32"
    table(title, ["loss", "B", "time", "over GEMMs", "peak extra memory", "B x B, computed"], rows)


@needs_card
def test_against_pytorch_metric_learning_on_a_gpu() -> None:
    pytest.importorskip("pytorch_metric_learning")
    rows = []
    for name, loss, size, _, _, _ in PEERS:
        functions = {"ours": cases.ours(loss, size, device="cuda"), "theirs": cases.theirs(name, size, device="cuda")}
        extra = {label: _peak(function) for label, function in functions.items()}
        seconds = fastest(functions, 4)
        del functions
        torch.cuda.empty_cache()
        ours, theirs = (f"{s * 1000:.1f} ms" for s in seconds.values())
        faster, smaller = seconds["theirs"] / seconds["ours"], extra["theirs"] / extra["ours"]
        rows.append((name, f"{size}", ours, theirs, f"{faster:.1f}x", _mib(extra["ours"]), f"1/{smaller:.0f}"))
    headers = ["loss", "B", "ours", "theirs", "faster", "peak extra memory", "of theirs"]
    table(f"Against pytorch-metric-learning on {torch.cuda.get_device_name()}, fp32", headers, rows)


def _peak(function: cases.Case) -> int:
    """Bytes of GPU memory that a call takes at most, above what is held before; it warms up, too."""
    function()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - held


def _square(rows: int, columns: int) -> int:
    """Bytes of a matrix of similarities and of its gradient in fp32."""
    return 2 * 4 * rows * columns


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f} MiB"
