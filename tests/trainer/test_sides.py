"""Anchors among positives, and positives among anchors, by a slow loop over numpy arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from trainer.evaluate import Embedded
from trainer.measurement import Across, measure

RECORDS, GROUPS, DIM = 60, 8, 5
NAMES = ("recall_at_1", "recall_at_5", "r_precision", "map_at_r", "mrr", "roc_auc")


def pairs(seed: int = 0) -> Embedded:
    """Triplets: anchors, positives of which each group has only two, negatives; some positives are an anchor elsewhere."""
    random = np.random.default_rng(seed)
    vector = {int(uid): random.standard_normal(DIM) for uid in range(400)}
    rows, groups = [], random.integers(GROUPS, size=RECORDS)
    for record, group in enumerate(groups.tolist()):
        again = int(np.flatnonzero(groups == group)[-1])  # the last record of the group
        rows.append((record, 0, group, record))
        rows.append((record, 1, group, 100 + 2 * group + record % 2 if record % 10 else again))
        rows.append((record, 2, (group + 1) % GROUPS, 300 + record))
    record, view, group, uid = (torch.tensor(column) for column in zip(*rows, strict=True))
    vectors = torch.tensor(np.stack([vector[int(one)] for one in uid.tolist()]))
    sample = torch.stack([torch.zeros_like(record), record, view], 1)
    return Embedded(torch.nn.functional.normalize(vectors, dim=1), group, sample, uid=uid)


def by_hand(found: Embedded, queries: str, part: NDArray[np.int64] | None) -> dict[str, float]:
    """Query by query, pair by pair."""
    vectors, group, view = found.vectors.numpy(), found.group.numpy(), found.sample[:, 2].numpy()
    assert found.uid is not None
    uid, seen, gallery = found.uid.numpy(), set(), []
    for row in range(len(group)):
        right_side = view[row] >= 1 if queries == "anchors" else view[row] == 0
        if right_side and (group[row], uid[row]) not in seen:
            seen.add((group[row], uid[row]))
            gallery.append(row)
    table: dict[str, list[float]] = {name: [] for name in NAMES[:-1]}
    same, score = [], []
    for query in np.flatnonzero(view == (0 if queries == "anchors" else 1)):
        allowed = [
            row
            for row in gallery
            if (group[row], uid[row]) != (group[query], uid[query]) and (part is None or part[row] != part[query])
        ]
        cosines = [float(vectors[query] @ vectors[row]) for row in allowed]
        same += [bool(group[row] == group[query]) for row in allowed]
        score += cosines
        order = sorted(range(len(allowed)), key=lambda i: (-cosines[i], i))
        right = [bool(group[allowed[i]] == group[query]) for i in order]
        relevant = sum(right)
        if relevant == 0:
            continue
        precision = [sum(right[: i + 1]) / (i + 1) for i in range(relevant)]
        table["recall_at_1"].append(right[0])
        table["recall_at_5"].append(any(right[:5]))
        table["r_precision"].append(precision[-1])
        table["map_at_r"].append(sum(p for p, good in zip(precision, right, strict=False) if good) / relevant)
        table["mrr"].append(1 / (1 + right.index(True)))
    return {**{name: float(np.mean(values)) for name, values in table.items()}, "roc_auc": float(roc_auc_score(same, score))}


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("queries", ["anchors", "positives"])
def test_one_side_is_searched_in_the_other(queries: str, across: bool) -> None:
    found = pairs()
    part = found.sample[:, 1] % 3 if across else None
    how = Across(lambda sample: sample[:, 1] % 3, lambda sample: sample[:, 1] % 3) if across else None
    measured = measure(found, NAMES, across=how, queries=queries, resamples=50)
    expected = by_hand(found, queries, None if part is None else part.numpy())
    for name, value in expected.items():
        assert measured.values[name] == pytest.approx(value, abs=1e-12), name
    assert measured.images == RECORDS
    assert measured.gallery < 2 * RECORDS
    low, high = measured.intervals["recall_at_1"]
    assert low <= measured.values["recall_at_1"] <= high


def test_a_member_that_many_records_share_is_in_the_gallery_once() -> None:
    vectors = torch.eye(4, dtype=torch.float64)[[0, 3, 1, 3, 2, 3]]
    sample = torch.tensor([[0, row // 2, row % 2] for row in range(6)])
    found = Embedded(vectors, torch.zeros(6, dtype=torch.int64), sample, uid=torch.tensor([1, 9, 2, 9, 3, 9]))
    assert measure(found, ["recall_at_1"], queries="anchors").gallery == 1
    assert measure(found, ["recall_at_1"], queries="positives").gallery == 3
    assert measure(found, ["recall_at_1"]).gallery == 6


def test_a_gallery_of_its_own_gives_its_other_side() -> None:
    found, gallery = pairs(), pairs(1)
    measured = measure(found, ["recall_at_1"], gallery=gallery, queries="positives")
    assert measured.gallery == RECORDS
    assert measured.images == RECORDS
