"""Exact neighbours and evaluation: time and memory beside faiss's exact index, as tables. Nothing is asserted of the times."""

from __future__ import annotations

from functools import partial

import faiss
import pytest
import torch
import torch.nn.functional as F

from tests.benchmarks import cases
from tests.benchmarks.measure import FULL, MIB, THREADS, apart, fastest, table

pytestmark = pytest.mark.benchmark

SIZE, DIM = 100_000, 128
QUERIES = SIZE if FULL else 1_024  # of the whole gallery


def test_exact_neighbours_beside_faiss() -> None:
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    x = F.normalize(torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(SIZE))).numpy()
    index = faiss.IndexFlatIP(DIM)
    index.add(x)
    rows = []
    for k in (1, 10, 100, 1000):
        ours, theirs = cases.nearest(SIZE, QUERIES, k, DIM), partial(index.search, x[:QUERIES], k + 1)
        taken = fastest({"nearfar": ours, "faiss": theirs}, 1 if FULL else 7)
        alike = float((ours()[:500].numpy() == theirs()[1][:500, 1:]).mean())  # faiss finds the query itself first
        assert alike > 0.999
        times = f"{taken['nearfar']:.2f} s", f"{taken['faiss']:.2f} s", f"{taken['nearfar'] / taken['faiss']:.2f}"
        rows.append([k, *times, f"{100 * alike:.2f} %"])
    title = f"{QUERIES} of {SIZE} x {DIM}, each searched among all others, {THREADS} threads"
    table(title, ["k", "nearfar", "faiss IndexFlatIP", "ratio", "same rows at the same places"], rows)


def test_time_and_memory_of_an_evaluation() -> None:
    rows = []
    for size, queries, k in ((SIZE, QUERIES, 10), (SIZE, 1000, 1000), (10 * SIZE, 1000, 10)):
        seconds, extra = apart("nearest", size=size, queries=queries, k=k, dim=DIM)
        rows.append([f"{k} neighbours of {queries} among {size}", f"{seconds:.1f} s", f"{extra / MIB:.0f} MiB"])
    for families in (["retrieval"], ["all"]):
        size = SIZE if FULL else SIZE // 5
        seconds, extra = apart("evaluation", size=size, families=families, dim=DIM)
        rows.append([f"evaluation of {size}: {families[0]}", f"{seconds:.1f} s", f"{extra / MIB:.0f} MiB"])
    table(f"Vectors of {DIM} numbers, {THREADS} threads", ["", "time", "memory besides them"], rows)
