"""How well the classes are clusters: k-means over the vectors, compared with the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clustering(vectors: Tensor, group: Tensor, names: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """`nmi` and `ami`, normalised and adjusted mutual information of group [N] and clusters of vectors [N, D].

    As many clusters as classes, by scikit-learn's KMeans with one start (k-means++), on one thread of the CPU: the same
    numbers anywhere, but slow for many images in many classes.
    """
    from sklearn.cluster import KMeans  # takes two seconds, which no other evaluation has to spend
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    from threadpoolctl import threadpool_limits

    scores = {"nmi": normalized_mutual_info_score, "ami": adjusted_mutual_info_score}
    _, labels = torch.unique(group.cpu(), return_inverse=True)
    with threadpool_limits(limits=1):
        clusters = KMeans(int(labels.max()) + 1, n_init=1, random_state=seed).fit_predict(vectors.cpu().numpy())
    return {name: float(scores[name](labels.numpy(), clusters)) for name in names}
