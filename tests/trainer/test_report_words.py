"""Class names, metric names and verdicts as people read them."""

from __future__ import annotations

import pytest

from trainer.report import names
from trainer.report.data import Evaluation, ReportData
from trainer.report.words import duration, label, rows, verdict

LOSS = [(step, 5.0 / step) for step in range(1, 40)]


def told(data: ReportData) -> tuple[str, str, str]:
    found = verdict(data, rows(data.before, data.after, data.headline), LOSS)
    return found.tone, found.head, found.text


def run(before: float, after: float, **more: object) -> ReportData:
    evaluation = Evaluation(num_classes=9, num_images=1000, classes_unseen=True)
    options = {"steps": 100, "evaluation": evaluation, **more}
    return ReportData("x", {"recall_at_1": after}, {"recall_at_1": before}, **options)  # type: ignore[arg-type]


def test_the_verdict_is_one_sentence_that_says_whether_it_learned() -> None:
    tone, head, text = told(run(0.33, 0.652))
    assert (tone, head) == ("good", "It learned")
    first = "65 of 100 searches find another image of their class first, among classes never trained on"
    assert text == f"{first}; before training it was 33."
    assert told(run(0.33, 0.34))[:2] == ("flat", "Little has changed")
    assert told(run(0.33, 0.2))[:2] == ("bad", "It got worse")
    assert told(run(0.33, 0.65, status=""))[:2] == ("good", "It is learning")
    assert "It was better at step 50: 0.710." in told(run(0.33, 0.65, best=(50, 0.71)))[2]


def test_a_gain_within_its_interval_is_no_gain() -> None:
    wide = {"recall_at_1": 0.40, "recall_at_1_low": 0.30, "recall_at_1_high": 0.50}
    assert told(ReportData("x", wide, {"recall_at_1": 0.33}, steps=9))[0] == "flat"
    narrow = {"recall_at_1": 0.40, "recall_at_1_low": 0.38, "recall_at_1_high": 0.42}
    assert told(ReportData("x", narrow, {"recall_at_1": 0.33}, steps=9))[0] == "good"


def test_without_evaluation_the_loss_is_all_that_can_be_told() -> None:
    tone, head, text = told(ReportData("x", steps=40))
    assert (tone, head) == ("open", "The loss fell")
    assert "Without data.eval" in text
    assert verdict(ReportData("x"), [], []).head == "Nothing logged yet"


def test_rows_take_any_metric_with_its_interval_and_leave_counts_out() -> None:
    after = {
        "eer": 0.08,
        "mrr": 0.7,
        "mrr_low": 0.6,
        "mrr_high": 0.8,
        "recall_at_1": 0.6,
        "num_queries": 9.0,
        "uniformity": -2.5,
    }
    found = rows({"eer": 0.3}, {**after, "broken": float("nan")}, "recall_at_1")
    assert [row.name for row in found] == ["Recall@1", "MRR", "EER", "Uniformity"]
    assert (found[1].low, found[1].high) == (0.6, 0.8)
    assert (found[2].before, found[2].lower_is_better, found[2].share) == (0.3, True, True)
    assert not found[3].share


def test_names_of_metrics_and_durations_are_written_for_people() -> None:
    expected = {
        "recall_at_1": "Recall@1",
        "val/recall_at_10": "Recall@10",
        "map_at_r": "MAP@R",
        "effective_rank": "Effective rank",
        "r_precision": "R-precision",
        "mrr": "MRR",
        "eer": "EER",
        "roc_auc": "ROC AUC",
        "tar_at_far_1e-3": "TAR at FAR 1e-3",
        "nmi": "NMI",
    }
    assert {name: label(name) for name in expected} == expected
    assert [duration(s) for s in (0.4, 59.6, 134.2, 7322)] == ["0 s", "1 min 0 s", "2 min 14 s", "2 h 2 min"]


def test_emoji_are_read_in_words() -> None:
    read = names.reader(["1f1e9-1f1ea", "1f550", "1f468-1f680", "23-20e3"])
    assert read("1f1e9-1f1ea") in ("flag: Germany", "flag: DE")  # where the system has no list of countries
    assert read("1f550") == "clock face one oclock"
    assert read("1f468-1f680") == "man + rocket"
    assert read("1f468-1f469-1f467") == "family: man, woman, girl"
    assert read("23-20e3") == "keycap: #"
    assert read("1f3f4-e0067-e0062-e0065-e006e-e0067") == "flag: England"
    assert read("a9") == "copyright sign"


@pytest.mark.parametrize(
    "classes", [["10", "11", "99"], ["cat", "dog"], ["face", "beef", "cafe"], ["größe", "1f550"], [], ["00ff"]]
)
def test_other_class_names_stay_as_they_are(classes: list[str]) -> None:
    read = names.reader(classes)
    assert [read(name) for name in classes] == classes
