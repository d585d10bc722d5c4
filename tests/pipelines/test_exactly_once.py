"""Every record once an epoch, whatever the schedule of workers and batches, for every kind of data and for mixtures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.growth import begin, unit_sizes, weights_of
from pipelines.manifest import Manifest
from pipelines.mixed_order import MixedOrder
from pipelines.mixture import Mixture, parts_of
from pipelines.plan import Plan, plan_records, plan_units
from pipelines.quotas import Quotas
from tests.pipelines.streams import settings, write_manifest

EPOCHS = 3
Make = Callable[[Path, np.random.Generator], Manifest]


def random_data(kind: str) -> Make:
    def make(out: Path, rng: np.random.Generator) -> Manifest:
        shards = [np.sort(rng.integers(0, 6, rng.integers(1, 25))).tolist() for _ in range(rng.integers(2, 7))]
        return write_manifest(out, kind, [[f"c{label}" for label in labels] for labels in shards])

    return make


def random_mixture(kind: str) -> Make:
    def make(out: Path, rng: np.random.Generator) -> Manifest:
        parts = [random_data(kind)(out / str(i), rng) for i in range(3)]
        weights = rng.choice([0.2, 1.0, 3.0], 3).tolist()
        return Mixture(parts, settings(train=[{"path": "x", "weight": weight} for weight in weights]).train)

    return make


def plans(manifest: Manifest, options: dict[str, Any], rng: np.random.Generator) -> list[Plan]:
    """What all ranks read while the batch, their number and the moments of restarts change, for EPOCHS of every source."""
    found = []
    position = 0
    data = settings(lanes=int(rng.integers(1, 9)), window=int(rng.integers(1, 12)), **options)
    order = MixedOrder(manifest, data, seed=9, histories=begin(manifest))
    enough = [EPOCHS * int(unit_sizes(part, data).sum()) for part in parts_of(manifest)]
    quotas = Quotas(weights_of(manifest))
    while (quotas.before(position) < enough).any():
        if rng.random() < 0.2:  # a restart
            order = MixedOrder(manifest, data, seed=9, histories=begin(manifest))
        batch = int(rng.integers(1, 40))
        world = min(batch, int(rng.integers(1, 6)))
        for rank in range(world):
            slots = order.slice(position, batch, rank, world)
            if data.per_class is None:
                found.append(plan_records(manifest, slots.epoch, slots.shard, slots.rows[:, 0], seed=9))
            else:
                found.append(plan_units(manifest, slots.epoch, slots.shard, slots.rows, slots.valid, seed=9))
        position += batch
    return found


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    **{kind: (random_data(kind), {}) for kind in ("pair", "labelled_pair", "triplet", "labelled")},
    "padded units": (random_data("labelled"), {"per_class": 3}),
    "whole units": (random_data("labelled"), {"per_class": 2, "tail": "drop"}),
    "mixed pairs": (random_mixture("pair"), {}),
    "mixed units": (random_mixture("labelled"), {"per_class": 3}),
    "mixed whole units": (random_mixture("labelled"), {"per_class": 2, "tail": "drop"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_record_comes_once_an_epoch(case: str, seed: int, tmp_path: Path) -> None:
    make, options = CASES[case]
    rng = np.random.default_rng([seed, *case.encode()])
    manifest = make(tmp_path, rng)
    seen: Counter[tuple[int, int, int]] = Counter()
    for plan in plans(manifest, options, rng):
        of_record = np.zeros(len(plan.sample), dtype=bool)
        of_record[plan.record[plan.present]] = True
        seen.update(map(tuple, plan.sample[of_record].tolist()))
    assert max(seen.values()) == 1
    first = 0
    for part in parts_of(manifest):
        expected = {(first + m, r) for m, size in enumerate(part.sizes.tolist()) for r in range(size)}
        epochs = [
            {(m, r) for e, m, r in seen if e == epoch and first <= m < first + len(part.sizes)} for epoch in range(EPOCHS)
        ]
        for rows in epochs:
            if options.get("tail") == "drop":
                runs = part.runs.length
                assert rows <= expected
                assert len(rows) == int((runs // 2 * 2).sum())
            else:
                assert rows == expected
        first += len(part.sizes)
