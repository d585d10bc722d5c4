"""Which classes the encoder takes for one another: communities of the graph of wrong neighbours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx
import torch

from trainer.report.search import Search

DEEPEST = 5  # neighbours of an image that are looked at
EDGES = 50_000  # the heaviest ones; communities of more take longer than a reader waits
# Modularity joins more the larger its graph is (Fortunato and Barthelemy 2007): it is judged as in a graph of this size.
SCALE = 64
EMPTY = frozenset({"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with", "without"})


@dataclass(frozen=True, slots=True)
class Cluster:
    """Groups that are taken for one another, the most confused first.

    `searches` are those of the members' images, `missed` are those of them whose nearest neighbour is another member.
    `pairs` are (group, other, images of either whose nearest neighbour is of the other), most first.
    """

    groups: tuple[int, ...]
    searches: int
    missed: int
    pairs: tuple[tuple[int, int, int], ...]


def clusters(found: Search, most: int) -> list[Cluster]:
    """Communities (Louvain, Blondel et al. 2008) of two groups or more, by the number times the share of mistakes inside.

    The weight between two groups is the number of wrong hits among the R nearest of each image (R: others of its group),
    each counted as 1 / R.
    """
    graph = networkx.Graph()
    weights = _weights(found)
    for a, b in sorted(weights, key=lambda pair: (-weights[pair], pair))[:EDGES]:
        graph.add_edge(a, b, weight=weights[a, b])
    if not graph:
        return []
    resolution = max(1.0, len(graph) / SCALE)
    parts = networkx.community.louvain_communities(graph, weight="weight", resolution=resolution, seed=0)
    first = _first_hits(found)
    listed = [_cluster(found, graph.subgraph(part), first) for part in parts if len(part) > 1]
    listed = [cluster for cluster in listed if cluster.missed]
    return sorted(listed, key=lambda c: (-(c.missed**2) / c.searches, c.groups))[:most]


def title(names: Sequence[str]) -> str:
    """What half of the names (at least three, or both of two) have in common, such as "clock face"; else the first names."""
    split = [_words(name) for name in names]
    counts = Counter(word for words in split for word in dict.fromkeys(words))
    enough = max(min(3, len(names)), len(names) / 2)
    shared = {word for word, n in counts.items() if n >= enough and word not in EMPTY and not word.isdigit()}
    for words in split:  # in the order in which the first member that has them all says them
        if shared and shared <= set(words):
            return " ".join(dict.fromkeys(word for word in words if word in shared))
    if shared:
        return " ".join(word for word, _ in counts.most_common() if word in shared)
    head = list(names[:3])
    if len(names) > len(head):
        return ", ".join(head) + " \u2026"
    return " and ".join([", ".join(head[:-1]), head[-1]]) if len(head) > 1 else head[0]


def named(cluster: Cluster, name: Callable[[int], str]) -> str:
    """The title of a cluster, where `name` gives a group's."""
    return title([name(group) for group in cluster.groups])


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name.casefold()) if word]


def _weights(found: Search) -> dict[tuple[int, int], float]:
    near = found.nearest[:, :DEEPEST]
    depth = found.others.clamp(max=near.shape[1])  # [N]
    hits = found.group[near]
    wrong = (torch.arange(near.shape[1])[None, :] < depth[:, None]) & (hits != found.group[:, None])
    rows, places = wrong.nonzero(as_tuple=True)
    weights: dict[tuple[int, int], float] = {}
    for a, b, r in zip(found.group[rows].tolist(), hits[rows, places].tolist(), depth[rows].tolist(), strict=True):
        pair = min(a, b), max(a, b)
        weights[pair] = weights.get(pair, 0.0) + 1 / r
    return weights


def _first_hits(found: Search) -> Counter[tuple[int, int]]:
    rows = found.wrong.nonzero()[:, 0]
    own, other = found.group[rows].tolist(), found.group[found.nearest[rows, 0]].tolist() if len(rows) else []
    return Counter(zip(own, other, strict=True))


def _cluster(found: Search, part: networkx.Graph, first: Counter[tuple[int, int]]) -> Cluster:
    groups = sorted(part, key=lambda g: (-part.degree(g, weight="weight"), g))
    both = {(a, b): first[a, b] + first[b, a] for a, b in (sorted(edge) for edge in part.edges)}
    pairs = sorted(((a, b, n) for (a, b), n in both.items() if n), key=lambda p: (-p[2], p[:2]))
    inside = torch.isin(found.group, torch.tensor(groups)) & (found.others > 0)
    return Cluster(tuple(groups), int(inside.sum()), sum(both.values()), tuple(pairs[:3]))
