"""Raw vectors are ranked by euclidean distance: metrics against numpy, scikit-learn and loops, also among ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import pairwise_distances, roc_auc_score

from configs.schema import Encoder
from trainer.encoders import build_encoder, is_raw
from trainer.euclidean import lifted
from trainer.evaluate import Embedded
from trainer.measurement import measure
from trainer.verification import match_thresholds

NAMES = ("recall_at_1", "recall_at_5", "map_at_r", "mrr", "roc_auc", "accuracy", "threshold_accuracy", "threshold_f1", "f1")


def embedded(vectors: np.ndarray, group: np.ndarray, match: np.ndarray | None = None) -> Embedded:
    rows = torch.arange(len(group))
    sample = torch.stack([torch.zeros_like(rows), rows, torch.zeros_like(rows)], dim=1)
    if match is not None:  # two rows are one record
        sample[:, 2], sample[:, 1] = rows % 2, rows // 2
    judged = None if match is None else torch.from_numpy(match)
    return Embedded(torch.from_numpy(vectors), torch.from_numpy(group), sample, judged, raw=True)


def random_raw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 vectors far from the origin and of any length; every other set lies on a grid, with ties and duplicates."""
    random = np.random.default_rng(seed)
    n, d = int(random.integers(20, 200)), int(random.integers(1, 9))
    group = random.integers(0, 6, n)
    if seed % 2:
        return random.integers(-3, 4, (n, d)).astype(np.float32) / 4 + np.float32(100.25), group
    spread = random.standard_normal((6, d))[group] + random.standard_normal((n, d))
    return (spread * 10.0 ** random.integers(-2, 3) + 50).astype(np.float32), group


def by_loops(distance: np.ndarray, group: np.ndarray, gallery_group: np.ndarray, *, same: bool) -> dict[str, float]:
    """Retrieval metrics, query by query; of equal distances the lower row is nearer."""
    found: dict[str, list[float]] = {name: [] for name in NAMES[:4]}
    for query, row in enumerate(distance):
        order = [g for g in np.lexsort((np.arange(len(row)), row)) if not (same and g == query)]
        right = np.array([gallery_group[g] == group[query] for g in order])
        relevant = int(right.sum())
        if not relevant:
            continue
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        found["recall_at_1"].append(float(right[0]))
        found["recall_at_5"].append(float(right[:5].any()))
        found["map_at_r"].append(float((precision * right)[:relevant].sum() / relevant))
        found["mrr"].append(float(1 / (1 + right.argmax())))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("seed", range(12))
def test_retrieval_is_that_of_exact_distances(seed: int) -> None:
    vectors, group = random_raw(seed)
    exact = vectors.astype(np.float64)
    squared = ((exact[:, None] - exact[None]) ** 2).sum(2)
    ours = measure(embedded(vectors, group), NAMES)
    expected = by_loops(squared, group, group, same=True)
    half = len(group) // 2
    across = measure(embedded(vectors[:half], group[:half]), NAMES, gallery=embedded(vectors[half:], group[half:]))
    for name, value in expected.items():
        assert ours.values[name] == pytest.approx(value, abs=1e-12), name
    for name, value in by_loops(squared[:half, half:], group[:half], group[half:], same=False).items():
        assert across.values[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_told_apart_by_distance_and_thresholds_are_distances(seed: int) -> None:
    vectors, group = random_raw(seed)
    first, second = np.triu_indices(len(group), 1)
    distance = pairwise_distances(vectors.astype(np.float64))[first, second]
    same = group[first] == group[second]
    ours = measure(embedded(vectors, group), NAMES).values
    assert ours["roc_auc"] == pytest.approx(roc_auc_score(same, -distance), abs=1e-6)
    assert ((distance <= ours["threshold_accuracy"]) == same).mean() == pytest.approx(ours["accuracy"], abs=1e-9)
    for threshold in np.quantile(distance, np.linspace(0, 1, 20)):
        assert ((distance <= threshold) == same).mean() <= ours["accuracy"] + 1e-12
    thresholds = match_thresholds(torch.from_numpy(vectors), torch.from_numpy(group), raw=True)
    assert thresholds["best_accuracy"] == ours["threshold_accuracy"]
    assert thresholds["best_f1"] == ours["threshold_f1"]


def test_neighbours_that_differ_in_the_last_bit_are_in_order() -> None:
    query = np.full((1, 2), 1000.0, dtype=np.float32)
    steps = 1000 + np.arange(1, 60, dtype=np.float32) * np.spacing(np.float32(1000))
    gallery = np.stack([steps, np.full_like(steps, 1000.0)], axis=1)[::-1].copy()
    left, right = lifted(torch.from_numpy(query), torch.from_numpy(gallery))
    scores = (left @ right.T)[0].numpy()
    assert np.array_equal(np.argsort(-scores), np.arange(len(steps))[::-1])
    np.testing.assert_allclose(np.sqrt(-scores), cdist(query.astype(np.float64), gallery.astype(np.float64))[0], rtol=1e-3)


def test_judged_pairs_are_compared_by_distance_in_folds_too() -> None:
    random = np.random.default_rng(0)
    match = np.repeat(random.integers(0, 2, 100), 2)
    left = random.standard_normal((100, 3)) * 5
    right = left + random.standard_normal((100, 3)) * np.where(match[::2] == 1, 0.2, 2.0)[:, None]
    vectors = np.stack([left, right], axis=1).reshape(200, 3).astype(np.float32)
    group = np.arange(200)
    found = measure(embedded(vectors, group, match), ("roc_auc", "accuracy_10_folds", "alignment", "effective_rank")).values
    distance = np.linalg.norm(vectors[::2].astype(np.float64) - vectors[1::2], axis=1)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(match[::2], -distance), abs=1e-12)
    assert found["accuracy_10_folds"] > 0.85
    assert "alignment" not in found
    assert "effective_rank" in found


@pytest.mark.parametrize("size", [16, 28, 32])
@pytest.mark.parametrize("grey", [True, False])
def test_lenet_gives_vectors_of_any_length_or_of_length_one(size: int, grey: bool) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, size, size)
    for raw in (True, False):
        part = {"name": "lenet", "dim": 5, "widths": [4, 6], "hidden": [7], "raw": raw, "grey": grey}
        encoder = build_encoder(Encoder.model_validate(part), size)
        vectors = encoder(images)
        assert vectors.shape == (4, 5)
        assert is_raw(encoder) == raw
        assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5) != raw
        vectors.square().sum().backward() if raw else vectors[:, 0].sum().backward()
        assert all(p.grad is not None for p in encoder.parameters())


def test_the_default_lenet_is_the_net_of_the_siamese_systems() -> None:
    encoder = build_encoder(Encoder.model_validate({"name": "lenet"}), 28)
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.dim() > 1]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (256, 1024), (256, 256), (2, 256)]


def test_images_too_small_for_lenet_are_refused() -> None:
    with pytest.raises(ValueError, match="16 pixels or more"):
        build_encoder(Encoder.model_validate({"name": "lenet"}), 12)
