"""How well a score, the cosine or minus the distance, tells whether two images show the same thing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.euclidean import as_distances, by_distance, lifted
from trainer.pairs import Pairs, every_pair
from trainer.protocol import Protocol, self_retrieval

FOLDS = 10


@dataclass(frozen=True, slots=True)
class Curve:
    """What happens when pairs whose cosine is at least `threshold` are taken for the same, by falling thresholds.

    Each float64 [T]; the first accepts nothing. A threshold lies in the middle between two cosines that were seen.
    """

    threshold: Tensor
    true_rate: Tensor  # of the pairs of the same thing that are accepted
    false_rate: Tensor  # of the others


def curve(pairs: Pairs) -> Curve:
    """Raises ValueError when there are no pairs of one sort."""
    if not (len(pairs.same) and len(pairs.different)):
        raise ValueError("telling pairs apart takes pairs of the same thing and pairs of different things")
    score = torch.cat([pairs.same, pairs.different])
    same = torch.arange(len(score), device=score.device) < len(pairs.same)
    score, order = score.sort(descending=True)
    accepted = same[order].cumsum(0)
    last = torch.cat([score[1:] < score[:-1], score.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]  # of equal cosines
    start = last.new_zeros(1)
    true = torch.cat([start, accepted[last]]).double() / len(pairs.same)
    false = torch.cat([start, last + 1 - accepted[last]]).double() / len(pairs.different)
    seen = score[last].double()
    borders = torch.cat([seen[:1] + 1e-6, seen, seen[-1:] - 1e-6])
    return Curve((borders[1:] + borders[:-1]) / 2, true, false)


def verification(pairs: Pairs) -> dict[str, float]:
    """The metrics of the family `verification`; rates are those of all pairs, estimated from a sample if `pairs` is one.

    eer: where as many of the different pairs are accepted as of the same are refused, on the line between two points of the
    curve. tar_at_far_X: the largest true rate whose false rate is at most X. accuracy, f1: at their best thresholds.
    Raises ValueError when there are no pairs of one sort.
    """
    found = curve(pairs)
    true, false = found.true_rate, found.false_rate
    far = {f"1e-{n}": int((false <= 10.0**-n).nonzero()[-1]) for n in (1, 2, 3, 4)}
    accuracy, f1 = _accuracy(found, pairs), _f1(found, pairs)
    best = {"accuracy": int(accuracy.argmax()), "f1": int(f1.argmax())}
    return {
        "roc_auc": float(torch.trapezoid(true, false)),
        "eer": _equal_error(true, false),
        **{f"tar_at_far_{name}": float(true[at]) for name, at in far.items()},
        "accuracy": float(accuracy[best["accuracy"]]),
        "f1": float(f1[best["f1"]]),
        "threshold_accuracy": float(found.threshold[best["accuracy"]]),
        "threshold_f1": float(found.threshold[best["f1"]]),
        "threshold_far_1e-3": float(found.threshold[far["1e-3"]]),
    }


def match_thresholds(vectors: Tensor, group: Tensor, *, raw: bool = False) -> dict[str, float]:
    """Cosines from which two images count as the same: at a false accept rate of 1e-3, at the best F1, the best accuracy.

    vectors [N, D], group [N]; `raw`: distances up to which they do. Raises ValueError when there are no pairs of one sort.
    """
    if raw:
        queries, gallery = lifted(vectors, vectors)
        found = as_distances(verification(by_distance(every_pair(Protocol(queries, group, gallery, group)))))
    else:
        found = verification(every_pair(self_retrieval(vectors, group)))
    return {
        "far_1e-3": found["threshold_far_1e-3"],
        "best_f1": found["threshold_f1"],
        "best_accuracy": found["threshold_accuracy"],
    }


def in_folds(score: Tensor, match: Tensor, *, folds: int = FOLDS) -> dict[str, float]:
    """Accuracy over judged pairs as on Labeled Faces in the Wild (Huang et al. 2007): the mean of ten tenths, and its error.

    score [P], match [P] 1 or 0: in order, cut into `folds`; the threshold for each is the most accurate one of the others.
    Raises ValueError when there are less pairs than folds, or pairs of one sort only.
    """
    if len(score) < folds:
        raise ValueError(f"{folds} folds take at least {folds} pairs; there are {len(score)}")
    found = []
    for fold in torch.tensor_split(torch.arange(len(score), device=score.device), folds):
        rest = torch.ones_like(match, dtype=torch.bool).index_fill_(0, fold, False)
        same, different = score[rest & (match == 1)], score[rest & (match == 0)]
        others = Pairs(same, different, len(same), len(different))
        points = curve(others)
        threshold = points.threshold[_accuracy(points, others).argmax()]
        found.append(((score[fold] >= threshold) == (match[fold] == 1)).double().mean())
    accuracy = torch.stack(found)
    return {"accuracy_10_folds": float(accuracy.mean()), "accuracy_10_folds_error": float(accuracy.std() / folds**0.5)}


def _accuracy(found: Curve, pairs: Pairs) -> Tensor:
    right = found.true_rate * pairs.num_same + (1 - found.false_rate) * pairs.num_different
    return right / (pairs.num_same + pairs.num_different)


def _f1(found: Curve, pairs: Pairs) -> Tensor:
    accepted = found.true_rate * pairs.num_same  # of the same thing
    return 2 * accepted / (accepted + found.false_rate * pairs.num_different + pairs.num_same)


def _equal_error(true: Tensor, false: Tensor) -> float:
    over = false - (1 - true)  # rises from -1 to 1
    at = int((over >= 0).nonzero()[0])
    share = -over[at - 1] / (over[at] - over[at - 1])
    return float(false[at - 1] + share * (false[at] - false[at - 1]))
