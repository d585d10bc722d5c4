"""Reading a config: what is taken, and what a mistake is answered with."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

from configs.load import dump_config, load_config, parse_config
from configs.registry import PARTS, checked_options, resolve
from configs.schema import Part
from tests.configs.faults import FILES, LAUGHS

GOOD = """
name: emoji
seed: 7
data:     {train: shards/train, eval: shards/eval, image_size: 48, batch: 256, per_class: 2, threads: 2}
encoder:  {name: convnet, dim: 128}
loss:     {name: info_nce, temperature: 0.07}
optim:    {name: adamw, lr: 2.0e-3, weight_decay: 0.05, schedule: cosine, warmup_steps: 50, clip_norm: 1.0}
train:    {steps: 1000, micro_batch: null, reproducible: false, precision: fp32, log_every: 10}
cluster:  {workers: 2, gpus_per_worker: 0, max_failures: 3, storage: runs}
tracking: {uri: "sqlite:///runs/mlflow.db", experiment: nearfar, register: emoji, promote: {alias: champion}}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_a_dumped_config_reads_back_as_the_same_config(good: Path, tmp_path: Path) -> None:
    config = load_config(good, ["optim.lr=1e-3", "data.augment.crop=[0.5, 1]"])
    assert (config.optim.lr, config.data.augment.crop) == (0.001, (0.5, 1.0))
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown setting; did you mean 'lr'?"),
        ("batch=3", "did you mean data.batch?"),
        ("data.batch=1", "data.batch: Input should be greater than or equal to 2"),
        ("data.per_class=3", "data.batch 256 is not a multiple of data.per_class 3; try 258"),
        ("train.epochs=2", "exactly one of steps and epochs"),
        ("cluster.workers=many", "cluster.workers: "),
        ("cluster.workers=200", "cluster.workers 200 is more than the 128 units of a batch"),
        ("train.micro_batch=3", "train.micro_batch 3 is not a multiple of data.per_class 2"),
        ("steps", "expected key.path=value"),
        ("name.x=1", "'name' holds 'emoji', not a section"),
        ("data.augment.crop=[1, 0.5]", "crop is [smallest, largest]"),
        ("data.augment.blur_sigma=[2, 0.1]", "blur_sigma is [smallest, largest]; got [2.0, 0.1]"),
        ("data.augment=5", "data.augment: "),
        ("optim.lr=-1", "optim.lr: Input should be greater than 0"),
        ("optim.lr=.nan", "optim.lr: "),
        ("optim.schedule=step", "schedule step and milestones belong together"),
        ("optim.milestones=[5]", "schedule step and milestones belong together"),
        ("optim={schedule: step, milestones: [9, 5]}", "each later than the one before; got [9, 5]"),
        ("optim.layer_decay=0", "optim.layer_decay: "),
        ("train.precision=fp16", "fp16 needs GPUs"),
        ("train.early_stop={metrik: recall_at_1}", "train.early_stop.metrik: unknown setting; did you mean 'metric'?"),
        ("encoder.init_skip=[head]", "there is no encoder.init"),
        ("encoder.freeze=-1", "encoder.freeze"),
        ("encoder.freeze=x", "encoder.freeze: Input should be a valid integer"),
        ("name=a/b", "name: "),
        ("data=[", "not valid YAML"),
        ("seed=!!bool maybe", "not valid YAML"),
        ("seed=0x" + "f" * 5000, "seed: a whole number beyond 64 bits"),
        ("train.steps=1000000000000", "train.steps: Input should be less than or equal to"),
        ("data.window=1000000000000", "data.window: Input should be less than or equal to"),
        ("data.batch=1000000000", "data.batch: Input should be less than or equal to"),
        ("data.timeout_s=1e300", "data.timeout_s: Input should be less than or equal to"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1: Input should be less than 1"),
        ("optim.lr=1e30", "optim.lr: Input should be less than or equal to"),
        ("encoder.note=2024-02-29", "encoder.note: a date is no setting"),
        ('encoder.path="a\\0b"', "encoder.path: the text holds '\\x00'"),
        ('loss.kind="\\ud800"', "loss.kind: the text holds '\\ud800'"),
        ("encoder={name: convnet, 5: 1}", "encoder.5: a setting's name is a word"),
        (f"data.eval={'x' * 300}", "data.eval: a name in this path is longer than 255 bytes"),
        ("cluster.storage=~nobody-at-all/runs", "cluster.storage: no home folder for '~nobody-at-all'"),
        ("loss={name: triplet, margin: [" + "[" * 30 + "]" * 31 + "}", "nested too deep"),
    ],
)
def test_a_mistake_is_one_message_that_names_the_key(good: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(good, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("text", FILES, ids=lambda text: repr(text[:30]))
def test_a_file_that_is_no_config_is_refused_in_few_words(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"bad\.yaml") as caught:
        load_config(path)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_too_large_to_be_a_config_is_not_read_to_its_end() -> None:
    with pytest.raises(ValueError, match=r"/dev/zero: more than 256 KiB"):
        load_config("/dev/zero")


def test_a_list_that_holds_itself_over_and_over_is_refused(good: Path) -> None:
    good.write_text(good.read_text() + LAUGHS)
    with pytest.raises(ValueError, match="more than 10000 values"):
        load_config(good)


def test_settings_that_only_set_the_pace_do_not_change_the_identity(good: Path) -> None:
    base = load_config(good).identity()
    for pace in ("encoder.checkpointing=true", "train.max_skipped=3", "train.evaluate_every=7", "train.log_every=5"):
        assert load_config(good, [pace]).identity() == base
    for pace in ("data.threads=5", "cluster.workers=4", "train.log_every=1", "train.micro_batch=64", "tracking.experiment=x"):
        assert load_config(good, [pace]).identity() == base
    for pace in ("cluster.interface=lo", "cluster.placement=spread"):
        assert load_config(good, [pace]).identity() == base
    for matter in ("seed=8", "data.batch=128", "optim.lr=1e-3", "loss.temperature=0.1", "encoder.dim=64", "train.steps=5"):
        assert load_config(good, [matter]).identity() != base
    for matter in ("encoder.freeze=1", "encoder.init=x", "optim.layer_decay=0.5", "train.early_stop={patience: 2}"):
        assert load_config(good, [matter]).identity() != base
    early = ["train.early_stop={patience: 2}", "train.evaluate_every=7"]
    assert load_config(good, early).identity() != load_config(good, early[:1]).identity()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, parts in PARTS.items() for name in parts])
def test_every_registered_part_can_be_resolved(kind: str, name: str) -> None:
    assert callable(resolve(kind, name))


def test_options_of_a_part_are_checked_against_its_signature() -> None:
    part = parse_config({"name": "a", "data": {"train": "x"}, "train": {"steps": 1}, "loss": {"name": "triplet"}}).loss[0]
    assert checked_options("loss", part, resolve("loss", "triplet"), ()) == {}
    for options, message in [
        ({"margn": 1}, "did you mean 'margin'?"),
        ({"margin": "wide"}, "loss.margin: "),
        ({"miner": "lucky"}, "loss.miner: "),
        ({"margin": math.nan}, "loss.margin: Input should be a finite number"),
    ]:
        with pytest.raises(ValueError, match=r".") as caught:
            checked_options("loss", Part.model_validate({"name": "triplet", **options}), resolve("loss", "triplet"), ())
        assert message in str(caught.value)
    with pytest.raises(ValueError, match=r"loss\.name: .*did you mean 'info_nce'"):
        resolve("loss", "infonce")


def test_bounds_in_the_signature_of_a_part_hold_for_its_options() -> None:
    def encoder(dim: Annotated[int, Field(le=9)] = 5, widths: Sequence[Annotated[int, Field(ge=1)]] = ()) -> None: ...

    for options, message in [({"dim": 10}, "encoder.dim: .*less than or equal to 9, got 10"), ({"widths": [3, 0]}, "widths")]:
        with pytest.raises(ValueError, match=message):
            checked_options("encoder", Part.model_validate({"name": "x", **options}), encoder, ())


@pytest.mark.parametrize("name", ["nowhere:loss", ".relative:loss", ":loss", "math:", "math:nothing", "builtins:dict"])
def test_a_name_that_cannot_be_called_is_explained(name: str) -> None:
    with pytest.raises(ValueError, match=rf"loss.name: loss '{name}' cannot be loaded .*MODULE:FUNCTION"):
        resolve("loss", name)


def test_data_to_train_on_is_one_path_or_several_with_shares(good: Path) -> None:
    one = load_config(good)
    assert [(s.path, s.weight, s.namespace) for s in one.data.train] == [("shards/train", 1.0, None)]
    assert "train: shards/train" in dump_config(one)
    listed = load_config(good, ["data.train=[a, {path: b, weight: 3}]", "data.train.1.namespace=birds"])
    assert [(s.path, s.weight, s.namespace) for s in listed.data.train] == [("a", 1.0, None), ("b", 3.0, "birds")]
    assert parse_config(yaml.safe_load(dump_config(listed))) == listed


def test_shares_and_namespaces_of_sources_decide_what_a_run_computes_but_not_where_they_lie(good: Path) -> None:
    def identity(train: str) -> Any:
        return load_config(good, [f"data.train={train}"]).identity()

    assert identity("elsewhere") == identity("[{path: x, weight: 5}]") == load_config(good).identity()
    assert identity("[a, b]") == identity("[{path: c, weight: 2}, {path: d, weight: 2}]")
    assert identity("[a, {path: b, weight: 2}]") != identity("[a, b]")
    assert identity("[a, {path: b, namespace: n}]") != identity("[a, b]")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[]", "data.train: "),
        ("5", "data.train.0: "),
        ("[{path: a, weight: 0}]", "data.train.0.weight: Input should be greater than 0"),
        ("[{path: a, wieght: 2}]", "data.train.0.wieght: unknown setting; did you mean 'weight'?"),
        ("[a, {weight: 2}]", "data.train.1.path: required"),
        ("[{path: a, namespace: ''}]", "data.train.0.namespace: "),
    ],
)
def test_a_wrong_list_of_sources_is_explained(good: Path, train: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(good, [f"data.train={train}"])
