"""All metrics of embedded images: of every query, of pairs, of the whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.evaluation import CLUSTERING, FOLDS, ON_THE_SPHERE, RANKED, VERIFICATION, recall_depth
from trainer import collectives
from trainer.clustering import clustering
from trainer.confidence import intervals
from trainer.euclidean import as_distances, by_distance, lifted
from trainer.evaluate import Embedded
from trainer.pairs import Pairs, every_pair, given_pairs
from trainer.protocol import Protocol
from trainer.retrieval import per_query
from trainer.sides import sides
from trainer.spread import alignment, effective_rank, uniformity
from trainer.triplets import triplet_accuracy
from trainer.verification import in_folds, verification

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Across:
    """Images are searched among those of another part: `part` maps samples [N, 3] of the queries to numbers [N] of parts,
    `gallery_part` those of the gallery. `only_class`: of the same part only the query's own class is hidden.
    """

    part: Callable[[Tensor], Tensor]
    gallery_part: Callable[[Tensor], Tensor]
    only_class: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics by name; `queries`: how many images had something to find."""

    values: dict[str, float]
    images: int
    gallery: int
    queries: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of metrics that are means over queries
    parts: dict[int, dict[str, float]] = field(default_factory=dict)  # number of the part -> those metrics, and queries
    pairs: dict[str, int] = field(default_factory=dict)  # how many there are, and how many of them were looked at


def measure(
    found: Embedded,
    names: Sequence[str],
    *,
    gallery: Embedded | None = None,
    across: Across | None = None,
    queries: str = "all",
    resamples: int = 0,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The metrics `names` of images that are searched in `gallery`, or each among all others. Collective.

    `queries`: only `anchors` or `positives`, in the other side of the records; spread and clusters are those of all images.
    A metric that cannot be had, as there are no pairs to tell apart, is left out with a warning. The numbers are the same to
    the last bit on any number of ranks that hold the same vectors. Raw vectors are compared by euclidean distance, which then
    thresholds are; alignment and uniformity are of the sphere, and left out. Raises ValueError when a vector is not finite.
    """
    for vectors in (found.vectors, (gallery or found).vectors):
        if bad := int((~torch.isfinite(vectors).all(1)).sum()):
            raise ValueError(f"{bad} of {len(vectors)} vectors are not finite, so nothing can be searched")
    protocol = protocol_of(found, gallery, across, queries)
    searched = [name for name in names if name in RANKED or recall_depth(name) is not None]
    table = per_query(protocol, searched, beat)
    counts = (protocol.relevant() > 0).cpu()
    scores = torch.stack([table[name].cpu() for name in searched]) if searched else torch.zeros((0, len(counts)))
    values = _means(searched, scores[:, counts])
    more, pairs = collectives.from_first(lambda: _others(found, protocol, names))
    values |= more
    group = protocol.group.cpu()[counts]
    bounds = intervals(scores[:, counts], group, resamples=resamples).tolist() if resamples and len(group) and searched else []
    return Evaluation(
        values={name: values[name] for name in names if name in values},
        images=len(protocol.group),
        gallery=len(protocol.gallery_group),
        queries=int(counts.sum()),
        intervals={name: (low, high) for name, (low, high) in zip(searched, bounds, strict=False)},
        parts=_by_part(protocol, searched, scores, counts),
        pairs=pairs,
    )


def protocol_of(
    found: Embedded, gallery: Embedded | None = None, across: Across | None = None, queries: str = "all"
) -> Protocol:
    """Images searched in `gallery`, or each among all others; `across`: among those of other parts; `queries`: see `sides`."""
    among, own = gallery or found, None
    if queries != "all":
        found, among, own = sides(found, gallery, queries)
    pair = lifted(found.vectors, among.vectors) if found.raw else (found.vectors, among.vectors)
    part = gallery_part = None
    if across is not None:
        part = across.part(found.sample)
        gallery_part = across.gallery_part(among.sample)
    return Protocol(
        pair[0],
        found.group,
        pair[1],
        among.group,
        same=gallery is None and queries == "all",
        part=part,
        gallery_part=gallery_part,
        only_class=across is not None and across.only_class,
        own=own,
    )


def _means(names: Sequence[str], scores: Tensor) -> dict[str, float]:
    """Of scores [M, Q], exactly rounded sums, whatever their order; 0 without queries."""
    return {name: math.fsum(row) / max(1, len(row)) for name, row in zip(names, scores.tolist(), strict=True)}


def _by_part(protocol: Protocol, names: Sequence[str], scores: Tensor, counts: Tensor) -> dict[int, dict[str, float]]:
    if protocol.part is None:
        return {}
    part = protocol.part.cpu()
    groups = {number: counts & (part == number) for number in torch.unique(part).tolist()}
    return {n: {"queries": int(rows.sum()), **_means(names, scores[:, rows])} for n, rows in groups.items()}


def _others(found: Embedded, protocol: Protocol, names: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """What no single query tells: metrics of pairs, of the spread, of clusters; and the numbers of pairs."""
    wanted = set(names) - (ON_THE_SPHERE if found.raw else set())
    values, numbers = _of_pairs(found, protocol, wanted)
    if "effective_rank" in wanted:
        values["effective_rank"] = effective_rank(found.vectors)
    if "triplet_accuracy" in wanted and (share := triplet_accuracy(found)) is not None:
        values["triplet_accuracy"] = share
    clusters = [name for name in CLUSTERING if name in wanted]
    return values | (clustering(found.vectors, found.group, clusters) if clusters else {}), numbers


def _of_pairs(found: Embedded, protocol: Protocol, wanted: set[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Over the pairs that were judged, if there are such, else over all; the uniformity over all."""
    if not wanted & {*VERIFICATION, *FOLDS, "alignment", "uniformity"}:
        return {}, {}
    values: dict[str, float] = {}
    judged = _judged(found)
    every = every_pair(protocol) if judged is None or "uniformity" in wanted else None
    every = by_distance(every) if every is not None and found.raw else every
    pairs = every if judged is None else given_pairs(*judged)
    assert pairs is not None
    if wanted & set(VERIFICATION):
        values |= _unless_impossible(lambda: verification(pairs))
    if wanted & set(FOLDS) and judged is not None:
        values |= _unless_impossible(lambda: in_folds(*judged))
    if found.raw:
        values = as_distances(values)
    if "alignment" in wanted and len(pairs.same):
        values["alignment"] = alignment(pairs.same)
    if "uniformity" in wanted and every is not None and every.num_same + every.num_different:
        values["uniformity"] = uniformity(every)
    return values, _numbers(pairs)


def _judged(found: Embedded) -> tuple[Tensor, Tensor] | None:
    """Score [P], the cosine or minus the distance, and match [P] of the labelled pairs of which both images are there, in
    their order.
    """
    if found.match is None:
        return None
    record = found.sample[:, :2]
    left = ((record[1:] == record[:-1]).all(1)).nonzero()[:, 0]  # in order: the right side follows
    first, second = found.vectors[left], found.vectors[left + 1]
    score = -(first.double() - second.double()).norm(dim=1) if found.raw else (first * second).sum(1)
    return score, found.match[left]


def _unless_impossible(metrics: Callable[[], dict[str, float]]) -> dict[str, float]:
    try:
        return metrics()
    except ValueError as error:
        logger.warning("metrics left out: %s", error)
        return {}


def _numbers(pairs: Pairs) -> dict[str, int]:
    return {
        "same": pairs.num_same,
        "different": pairs.num_different,
        "same_used": len(pairs.same),
        "different_used": len(pairs.different),
    }
