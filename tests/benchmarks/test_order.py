"""Time to set up, to seek and to plan batches at a billion samples, as tables. Nothing is asserted of the times."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pipelines.manifest import Runs
from pipelines.order import Order
from pipelines.quotas import Quotas
from pipelines.units import Units
from tests.benchmarks.measure import table

pytestmark = pytest.mark.benchmark

NUM_SAMPLES, NUM_SHARDS, RUN, PER_CLASS, BATCH = 10**9, 10**5, 64, 4, 4096
BATCHES = 200


def timed(function: Callable[[], object]) -> str:
    start = time.perf_counter()
    function()
    return f"{1000 * (time.perf_counter() - start):.1f} ms"


def test_order_of_a_billion_samples() -> None:
    sizes = np.full(NUM_SHARDS, NUM_SAMPLES // NUM_SHARDS)
    rows = [("set up", timed(lambda: Order(sizes, seed=1)))]
    order = Order(sizes, seed=1)
    far = 12 * NUM_SAMPLES + 345
    rows.append(("first batch of 4096 at any position (seek)", timed(lambda: order.slice(far, BATCH))))
    for world in (1, 64):
        times = []
        for batch in range(1, BATCHES):
            start = time.perf_counter()
            order.slice(far + batch * BATCH, BATCH, batch % world, world)
            times.append(time.perf_counter() - start)
        rows.append((f"every further one, of {world} ranks", f"{1000 * float(np.mean(times)):.2f} ms"))
    rows.append(("quotas of 8 sources with odd weights", timed(lambda: Quotas(np.sqrt(np.arange(2.0, 10.0)).tolist()))))
    table(f"Order of {NUM_SAMPLES:.0e} samples in {NUM_SHARDS:.0e} shards", ["", "time"], rows)


def test_units_of_a_billion_images(tmp_path: Path) -> None:
    num_runs = NUM_SAMPLES // RUN
    shard = np.arange(num_runs) * NUM_SHARDS // num_runs
    start = np.arange(num_runs) % (NUM_SAMPLES // NUM_SHARDS // RUN) * RUN
    runs = Runs(shard, start, np.full(num_runs, RUN))
    file = tmp_path / "runs.parquet"
    pa.parquet.write_table(pa.table({"shard": shard, "start": start, "length": runs.length}), file)

    def load() -> Runs:
        read = pa.parquet.read_table(file)
        return Runs(*(read[name].to_numpy().astype(np.int64) for name in ("shard", "start", "length")))

    def units() -> Units:
        return Units(runs, NUM_SHARDS, per_class=PER_CLASS, tail="pad", seed=1)

    rows = [("load runs.parquet, " + f"{file.stat().st_size / 2**20:.0f} MiB", timed(load)), ("set up", timed(units))]
    made = units()
    order = Order(made.sizes, seed=1)
    times = []
    for batch in range(50):
        at = 3 * NUM_SAMPLES + batch * BATCH // PER_CLASS
        begin = time.perf_counter()
        made.rows(*order.slice(at, BATCH // PER_CLASS))
        times.append(time.perf_counter() - begin)
    rows.append(("a batch of 1024 x 4", f"{1000 * float(np.median(times)):.2f} ms"))
    table(f"P x K units of {NUM_SAMPLES:.0e} images in runs of {RUN}", ["", "time"], rows)
