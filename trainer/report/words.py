"""Numbers as words for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.report.data import ReportData

ACRONYMS = {"map", "mrr", "eer", "tar", "far", "auc", "roc", "nmi", "ami", "f1", "ap"}
LOWER_IS_BETTER = ("eer", "alignment", "uniformity", "loss")
NO_SHARES = ("alignment", "uniformity", "loss", "threshold")
FIRST = ("recall_at_1", "precision_at_1", "map_at_r", "r_precision", "mrr")


@dataclass(frozen=True, slots=True)
class Row:
    """A metric before and after training, with the interval of the latter where it is known."""

    name: str
    before: float | None
    after: float
    low: float | None
    high: float | None
    share: bool  # whether it lies between 0 and 1
    lower_is_better: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """`tone`: good, flat, bad or open; `head` in two or three words; `text` is one sentence."""

    tone: str
    head: str
    text: str


def rows(before: Mapping[str, float], after: Mapping[str, float], headline: str) -> list[Row]:
    """Every metric but counts, the headline first, then those between 0 and 1. `_low` and `_high` become intervals."""
    bounds = {name for name in after if name.endswith(("_low", "_high")) and name.rpartition("_")[0] in after}
    numbers = [name for name, value in after.items() if isinstance(value, (int, float)) and math.isfinite(value)]
    names = [name for name in numbers if name not in bounds and not name.startswith("num_")]
    order = {name: place for place, name in enumerate(dict.fromkeys((headline, *FIRST)))}
    found = [
        Row(
            label(name),
            before.get(name),
            after[name],
            after.get(f"{name}_low"),
            after.get(f"{name}_high"),
            0 <= after[name] <= 1 and 0 <= before.get(name, 0) <= 1 and not name.startswith(NO_SHARES),
            name.startswith(LOWER_IS_BETTER),
        )
        for name in sorted(names, key=lambda name: order.get(name, len(order)))
    ]
    return sorted(found, key=lambda row: not row.share)


def label(name: str) -> str:
    """`recall_at_1` -> `Recall@1`, `map_at_r` -> `MAP@R`, `tar_at_far_1e-3` -> `TAR at FAR 1e-3`."""
    head, at, tail = name.rpartition("/")[2].partition("_at_")
    if at and "_" not in tail:
        return f"{_spelled(head)}@{tail.upper()}"
    return " at ".join(filter(None, (_spelled(head), _spelled(tail, first=False))))


def _spelled(name: str, *, first: bool = True) -> str:
    words = [word.upper() if word in ACRONYMS else word for word in name.split("_")]
    if first and words[0] and words[0] != words[0].upper():
        words[0] = words[0].capitalize()
    return " ".join(words).replace("R precision", "R-precision")


def duration(seconds: float) -> str:
    """`134.2` -> `2 min 14 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number(value: float) -> str:
    """Three digits behind the point below 10, fewer above."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def verdict(data: ReportData, rows: list[Row], loss: list[tuple[int, float]]) -> Verdict:
    """Whether training worked, in one sentence. loss: (step, value)."""
    if not rows:
        return _of_loss(data, loss)
    row = rows[0]
    if row.before is None or not data.steps:
        return Verdict("open", "Not to compare" if data.steps else "Untrained", f"{row.name} is {number(row.after)}.")
    gain = (row.after - row.before) * (-1 if row.lower_is_better else 1)
    noise = _noise(data, row)
    tone, head = (
        ("flat", "Little has changed")
        if abs(gain) <= noise
        else ("good", "It learned")
        if gain > 0
        else ("bad", "It got worse")
    )
    if not data.finished:
        head = {"good": "It is learning", "flat": "Nothing to see yet", "bad": "It is getting worse"}[tone]
    return Verdict(tone, head, _sentence(data, row) + _past_its_best(data, row))


def _sentence(data: ReportData, row: Row) -> str:
    assert row.before is not None
    if row.name != "Recall@1":
        return f"{row.name} went from {number(row.before)} to {number(row.after)}."
    kind = data.evaluation.kind if data.evaluation else ""
    what = "another image of their class" if kind == "labelled" else "their counterpart"
    unseen = ", among classes never trained on" if data.evaluation and data.evaluation.classes_unseen else ""
    now, was = (_of_hundred(value) for value in (row.after, row.before))
    return f"{now} of 100 searches find {what} first{unseen}; before training it was {was}."


def _of_hundred(share: float) -> str:
    exact = 100 * share
    return f"{exact:.0f}" if share in (0, 1) or 0.5 <= exact <= 99.5 else f"{exact:.1f}"


def _past_its_best(data: ReportData, row: Row) -> str:
    best = data.best
    if best is None or row.name != label(data.headline) or best[1] - row.after < 0.02 or row.lower_is_better:
        return ""
    return f" It was better at step {best[0]:,}: {number(best[1])}."


def _noise(data: ReportData, row: Row) -> float:
    """Half the interval of the metric; where it is not known, two standard errors of a share of the queries."""
    if row.low is not None and row.high is not None:
        return (row.high - row.low) / 2
    queries = data.insight.num_queries if data.insight else data.evaluation.num_images if data.evaluation else 0
    share = min(max(row.after, 0.0), 1.0)
    return max(0.005, 2 * math.sqrt(share * (1 - share) / queries)) if row.share and queries else 0.005


def _of_loss(data: ReportData, loss: list[tuple[int, float]]) -> Verdict:
    if len(loss) < 2:
        return Verdict("open", "Nothing logged yet", "There is no step to tell of.")
    tenth = max(1, len(loss) // 10)
    first, last = (sum(v for _, v in part) / len(part) for part in (loss[:tenth], loss[-tenth:]))
    tone, head = ("good", "The loss fell") if last < first else ("flat", "The loss did not fall")
    text = f"It went from {number(first)} to {number(last)}. Without data.eval nothing tells how well the encoder finds things."
    return Verdict(tone if last >= first else "open", head, text)
