"""The evaluate section: which metrics there are, what they are called, and who searches among whom."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from configs.section import Place, Section

RECALL_AT = (1, 5, 10)
VERIFICATION = (
    *("roc_auc", "eer", *(f"tar_at_far_1e-{n}" for n in (1, 2, 3, 4)), "accuracy", "f1"),
    *("threshold_accuracy", "threshold_f1", "threshold_far_1e-3"),
)
FOLDS = ("accuracy_10_folds", "accuracy_10_folds_error")
TRIPLETS = ("triplet_accuracy",)
SPREAD = ("alignment", "uniformity", "effective_rank")
CLUSTERING = ("nmi", "ami")
RANKED = ("precision_at_1", "r_precision", "map_at_r", "mrr")  # besides recall_at_K, for any K
FAMILIES = {"verification": VERIFICATION, "folds": FOLDS, "triplets": TRIPLETS, "spread": SPREAD, "clustering": CLUSTERING}
ON_THE_SPHERE = frozenset({"alignment", "uniformity"})  # of vectors of unit length alone
SMALLER = frozenset({"eer", "alignment", "uniformity"})  # is better
NEITHER = frozenset({"threshold_accuracy", "threshold_f1", "threshold_far_1e-3", "accuracy_10_folds_error", "effective_rank"})
_RECALL = re.compile(r"recall_at_([1-9]\d{0,5})")


def retrieval_names(ks: Iterable[int] = RECALL_AT) -> tuple[str, ...]:
    """What the family `retrieval` stands for."""
    return (*(f"recall_at_{k}" for k in ks), *RANKED)


def recall_depth(name: str) -> int | None:
    """The K of `recall_at_K`, or None."""
    found = _RECALL.fullmatch(name)
    return int(found[1]) if found else None


def expand(names: Iterable[str], ks: Iterable[int] = RECALL_AT) -> tuple[str, ...]:
    """Metrics, once each, of names that may be families; `all` is every family but `clustering`. Raises ValueError."""
    retrieval, found = retrieval_names(ks), []
    for name in names:
        if name == "all":
            found += [*retrieval, *VERIFICATION, *FOLDS, *TRIPLETS, *SPREAD]
        elif name == "retrieval":
            found += retrieval
        elif name in FAMILIES:
            found += FAMILIES[name]
        else:
            found.append(require_metric(name))
    return tuple(dict.fromkeys(found))


def require_metric(name: str) -> str:
    """`name`, if it is a metric's. Raises ValueError that lists them."""
    if recall_depth(name) is None and name not in {*RANKED, *(one for family in FAMILIES.values() for one in family)}:
        every = ", ".join(
            ("recall_at_1 (or any other number)", *RANKED, *VERIFICATION, *FOLDS, *TRIPLETS, *SPREAD, *CLUSTERING)
        )
        families = ", ".join(("all", "retrieval", *FAMILIES))
        raise ValueError(f"{name!r} is no metric; there are {every}; and for several at once: {families}")
    return name


def require_ranking(name: str) -> str:
    """`name`, if better models have more, or less, of that metric. Raises ValueError."""
    if require_metric(name) in NEITHER:
        raise ValueError(f"{name!r} is neither better when larger nor when smaller; take for instance recall_at_1 or eer")
    return name


def goodness(name: str, value: float) -> float:
    """A number that is larger for better values of the metric."""
    return -value if name in SMALLER else value


class Evaluate(Section):
    """What is measured on `data.eval`, at `train.evaluate_every` and at the end."""

    metrics: tuple[str, ...] = Field(
        ("recall_at_1", "recall_at_5", "recall_at_10", "map_at_r", "r_precision"),
        description="at every evaluation; recall_at_K for any K, other metrics, or families of them",
    )
    at_end: tuple[str, ...] = Field(("all",), description="besides, before the first step and after the last")
    bootstrap: Annotated[int, Field(ge=0, le=10**6)] = Field(
        1000, description="resamples of the classes for the 95 % interval of tracking.promote.metric at both ends; 0: none"
    )
    gallery: Place | None = Field(
        None, description="shards that the images of data.eval are searched in; default: each among all others of data.eval"
    )
    queries: Literal["all", "anchors", "positives"] = Field(
        "all", description="of pairs and triplets: anchors are searched among positives and negatives, positives among anchors"
    )
    across: Annotated[str, Field(max_length=1000)] | None = Field(
        None,
        description="regular expression for keys with one group: images are searched among those where it catches another",
    )
    across_hides: Literal["all", "same_class"] = Field(
        "all", description="of the images with the same catch: all, or those of the query's class (person re-identification)"
    )

    @field_validator("metrics", "at_end")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        expand(names)
        return names

    @field_validator("across")
    @classmethod
    def _one_group(cls, across: str | None) -> str | None:
        if across is None:
            return None
        try:
            groups = re.compile(across).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{across!r} is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"{across!r} has {groups} groups; put parentheses around the one part that is to differ")
        return across
