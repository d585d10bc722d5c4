"""`nearfar evaluate` and the config section, on real shards and a real run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.evaluation import EvaluationSet
from configs.evaluation import Evaluate, expand, goodness, require_ranking
from configs.schema import Data, Encoder
from pipelines.manifest import Manifest
from pipelines.stream import evaluation_batches
from tests.conftest import CONFIG, Answer
from tests.trainer.embeddings import Set
from tests.trainer.test_retrieval import KS, by_the_oracle, recall_by_loops
from tests.trainer.test_verification import all_pairs, by_scikit_learn
from trainer.encoders import build_encoder
from trainer.evaluate import Embedded, embed, gather
from trainer.measurement import measure

Nearfar = Callable[..., Answer]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with the error rate as what decides."""
    from cluster.run import train
    from configs.load import load_config

    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "run.yaml").write_text(CONFIG.format(name="small", shards=digits, storage=folder / "runs"))
    few = ["train.steps=8", "train.evaluate_every=4", "train.checkpoint_every=4", "cluster.workers=1", "tracking.enabled=false"]
    decides = ["tracking.promote.metric=mrr", "train.early_stop={metric: eer, patience: 9}"]
    train(load_config(folder / "run.yaml", [*few, *decides]), local=True)
    return folder / "runs" / "small"


def evaluated(nearfar: Nearfar, *arguments: object) -> dict[str, Any]:
    answer = nearfar("evaluate", *arguments, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def rows_of(run: Path) -> dict[int, dict[str, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        row["step"]: {name[4:]: value for name, value in row.items() if name.startswith("val/")}
        for row in rows
        if any(name.startswith("val/") for name in row)
    }


def test_training_measures_little_on_the_way_and_everything_at_both_ends(run: Path) -> None:
    rows = rows_of(run)
    usual = {"recall_at_1", "recall_at_5", "recall_at_10", "map_at_r", "r_precision"}
    assert set(rows[4]) == usual | {"eer", "mrr"}  # what decides is measured every time
    others = {"accuracy_10_folds", "accuracy_10_folds_error", "triplet_accuracy"}  # of pairs and triplets
    everything = {*expand(("all",)), "mrr_low", "mrr_high"} - others
    assert set(rows[0]) == set(rows[8]) == everything
    assert rows[8]["mrr_low"] < rows[8]["mrr"] < rows[8]["mrr_high"]


def test_the_command_finds_what_training_found_on_any_number_of_workers(nearfar: Nearfar, run: Path, digits: Path) -> None:
    alone = evaluated(nearfar, run, digits / "eval", "--metrics", "all,clustering")
    last = rows_of(run)[8]  # in float64, while the command embeds in float32
    assert [last.pop("mrr_low"), last.pop("mrr_high")] == pytest.approx(alone["intervals"]["mrr"], abs=2e-3)
    assert {name: alone["metrics"][name] for name in last} == pytest.approx(last, abs=2e-3)
    assert evaluated(nearfar, run, digits / "eval", "--metrics", "all,clustering", "--workers", 3) == alone
    low, high = alone["intervals"]["recall_at_1"]
    assert low < alone["metrics"]["recall_at_1"] < high
    text = nearfar("evaluate", run, digits / "eval", "--metrics", "recall_at_1").out
    assert f"recall_at_1             {alone['metrics']['recall_at_1']:.4f}  [{low:.3f}, {high:.3f}]" in text


def test_a_gallery_and_parts_of_the_key(nearfar: Nearfar, run: Path, digits: Path) -> None:
    found = evaluated(nearfar, run / "export", digits / "eval", "--gallery", digits / "train", "--k", "1,3", "--bootstrap", 0)
    assert {"recall_at_1", "recall_at_3"} <= set(found["metrics"])
    assert (found["images"], found["gallery_images"], found["intervals"]) == (359, 1438, {})
    across = evaluated(nearfar, run, digits / "eval", "--across", r"(\d)$", "--metrics", "recall_at_1")
    assert set(across["parts"]) == set("0123456789")
    assert sum(part["queries"] for part in across["parts"].values()) == across["queries"] == 359
    person = evaluated(
        nearfar, run, digits / "eval", "--across", r"(\d)$", "--across-hides", "same_class", "--metrics", "map_at_r"
    )
    assert person["metrics"]["map_at_r"] < evaluated(nearfar, run, digits / "eval", "--across", r"(\d)$")["metrics"]["map_at_r"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--metrics", "recall"), ("metrics: 'recall' is no metric", "recall_at_1")),
        (("--metrics", "folds"), ("folds is for labelled pairs",)),
        (("--across", "x"), ("across: 'x' has 0 groups",)),
        (("--across", "("), ("across: '(' is no regular expression",)),
        (("--across", "(x)-none"), ("does not match the key",)),
        (("--across-hides", "some"), ("across_hides", "same_class")),
        (("--gallery", "nowhere"), ("no folder 'nowhere'",)),
        (("--k", "1,x"), ("--k '1,x'",)),
        (("--device", "tpu"), ("--device tpu",)),
        (("--workers", "0"), ()),
    ],
)
def test_what_cannot_be_measured_is_refused_with_one_message(
    nearfar: Nearfar, digits: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    answer = nearfar("evaluate", digits, digits / "eval", *options)  # looked at before the model, which is none
    assert (answer.code, answer.out) == (2, "")
    assert "Traceback" not in answer.err
    assert all(word in answer.err for word in words), answer.err


def test_a_config_is_refused_before_anything_is_trained(nearfar: Nearfar, config_file: Path, digits: Path) -> None:
    for setting, words in {
        "evaluate.metrics=[recall]": ("evaluate.metrics", "recall_at_1"),
        "evaluate.metrics=[accuracy_10_folds]": ("evaluate: accuracy_10_folds is for labelled pairs",),
        "evaluate.gallery=nowhere": ("evaluate.gallery: ", "nowhere"),
        "evaluate.across=(x)(y)": ("evaluate.across", "2 groups"),
        r"evaluate.across=(^\d)": ("evaluate", "nothing can be found"),
        "tracking.promote.metric=threshold_f1": ("tracking.promote.metric", "neither"),
        "train.early_stop={metric: effective_rank}": ("train.early_stop.metric", "neither"),
    }.items():
        answer = nearfar("check", config_file, "--set", setting)
        assert answer.code == 2, (setting, answer)
        assert all(word in answer.err for word in words), answer.err
    fine = (
        "--set",
        f"evaluate.gallery={digits}/train",
        "--set",
        r"evaluate.across=(\d)$",
        "--set",
        "evaluate.metrics=[all, nmi]",
    )
    assert nearfar("check", config_file, *fine).code == 0


def test_parts_belong_to_the_records_they_were_caught_in(digits: Path) -> None:
    found = EvaluationSet.open(str(digits / "eval"), Evaluate(across=r"(\d)$"))
    assert found.across is not None
    for shard in range(len(found.queries.sizes)):
        keys = found.queries.keys(shard)
        rows = torch.arange(len(keys))
        sample = torch.stack([torch.full_like(rows, shard), rows, torch.zeros_like(rows)], dim=1)
        assert [found.parts[number] for number in found.across.part(sample).tolist()] == [key[-1] for key in keys]


def test_names_say_which_way_is_better() -> None:
    assert goodness("recall_at_7", 0.5) > goodness("recall_at_7", 0.4)
    assert goodness("eer", 0.4) > goodness("eer", 0.5)
    assert require_ranking("uniformity") == "uniformity"
    assert expand(("retrieval", "recall_at_1"), (1, 2))[:2] == ("recall_at_1", "recall_at_2")
    for name in ("recall_at_0", "recall_at_", "recall@1", "threshold_f1", "all"):
        with pytest.raises(ValueError, match=r"no metric|neither"):
            require_ranking(name)


@pytest.mark.acceptance
def test_emoji_seen_by_an_untrained_network_have_the_numbers_of_the_oracles(emoji_shards: Path) -> None:
    data = Data.model_validate({"train": str(emoji_shards / "train"), "image_size": 32})
    torch.manual_seed(0)
    encoder = build_encoder(Encoder.model_validate({"name": "convnet", "dim": 64}), 32)
    batches = evaluation_batches(Manifest.open(emoji_shards / "eval"), data)
    found = gather(embed(encoder, batches, lambda batch: batch.images / 255))
    known = Set(found.vectors.double(), found.group)
    ours = measure(Embedded(known.vectors, found.group, found.sample), expand(("all",), KS))
    for name, value in (by_the_oracle(known) | recall_by_loops(known) | by_scikit_learn(*all_pairs(known))).items():
        assert ours.values[name] == pytest.approx(value, abs=1e-6), name
