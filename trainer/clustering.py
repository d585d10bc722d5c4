"""How well the classes are clusters: k-means over the vectors, compared with the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from threadpoolctl import threadpool_limits
from torch import Tensor

SCORES = {"nmi": normalized_mutual_info_score, "ami": adjusted_mutual_info_score}  # arithmetic means, scikit-learn's default


def clustering(vectors: Tensor, group: Tensor, names: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """Normalised and adjusted mutual information between group [N] and the clusters of vectors [N, D], as many as classes.

    scikit-learn's KMeans, one start (k-means++), on one thread of the CPU: the same numbers anywhere, but slow when large.
    """
    _, labels = torch.unique(group.cpu(), return_inverse=True)
    with threadpool_limits(limits=1):
        clusters = KMeans(int(labels.max()) + 1, n_init=1, random_state=seed).fit_predict(vectors.cpu().numpy())
    return {name: float(SCORES[name](labels.numpy(), clusters)) for name in names}
