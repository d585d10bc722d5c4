"""`nearfar inspect --mining`: the shares and picks of loops over the same batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.building import augmented, objective_for
from cluster.mining_inspection import inspect_mining
from cluster.mining_sheet import spread
from configs.load import load_config
from configs.schema import RunConfig
from pipelines.batch import Batch
from pipelines.mixture import open_sources
from pipelines.pack import pack
from pipelines.sources.sampled import Sample
from pipelines.stream import Loader
from tests.conftest import Answer
from tests.pipelines.conftest import paint
from trainer.encoders import build_encoder
from trainer.hardness import MOST_POSITIVES
from trainer.watching import Watcher

Nearfar = Callable[..., Answer]
CONFIG = """
name: watched
seed: 5
data: {{train: "{shards}", image_size: 16, batch: {batch}, per_class: {per_class}, augment: {{crop: [0.7, 1]}}}}
encoder: {{name: convnet, dim: 8, patch: 2, widths: [8], blocks: 1, grid: 2}}
loss: {loss}
optim: {{lr: 1.0e-2}}
train: {{steps: 4, log_every: 1, checkpoint_every: 2}}
cluster: {{workers: 1, storage: "{storage}"}}
tracking: {{enabled: false}}
"""
KINDS = ("hard", "semi_hard", "easy")


def write(folder: Path, shards: Path, loss: str, *, batch: int = 24, per_class: str = "3") -> Path:
    file = folder / "config.yaml"
    text = CONFIG.format(shards=shards, loss=loss, storage=folder / "runs", batch=batch, per_class=per_class)
    file.write_text(text)
    return file


def first_batch(config: RunConfig) -> tuple[torch.Tensor, Batch, torch.nn.Module]:
    """Vectors of the first batch by the untrained encoder, in float32."""
    with Loader(open_sources(config.data.train, None), config.data, seed=config.seed) as stream:
        batch = next(stream)
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.encoder, config.data.image_size).eval()
    with torch.no_grad():
        return encoder(augmented(config, torch.float32)(batch)), batch, encoder


def kind(d_ap: float, d_an: float, margin: float) -> str:
    return "hard" if d_an < d_ap else "semi_hard" if d_an < d_ap + margin else "easy"


@pytest.mark.parametrize("miner", ["semi_hard", "batch_hard", "semi_hard_within_margin", "hardest", None])
def test_shares_and_picks_are_those_of_loops_over_the_batch(
    miner: str | None, nearfar: Nearfar, digits: Path, tmp_path: Path
) -> None:
    loss = "{name: sup_con}" if miner is None else f"{{name: triplet, miner: {miner}, margin: 0.1}}"
    margin = 0.2 if miner is None else 0.1
    file = write(tmp_path, digits / "train", loss)
    answer = nearfar("inspect", "--mining", file, "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    (row,) = told["encoders"]
    config = load_config(file)
    vectors, batch, encoder = first_batch(config)
    d = torch.cdist(vectors.double(), vectors.double()).numpy()
    group, count = batch.group.numpy(), dict.fromkeys(KINDS, 0)
    expected = {}
    for a in range(len(d)):
        positives = [p for p in batch.uid.argsort().tolist() if group[p] == group[a] and p != a]
        negatives = [n for n in range(len(d)) if group[n] != group[a]]
        for p in positives[:MOST_POSITIVES]:
            for n in negatives:
                count[kind(d[a, p], d[a, n], margin)] += 1
        for p in [max(positives, key=lambda p: d[a, p])] if miner == "batch_hard" else positives:
            farther = [n for n in negatives if d[a, n] > d[a, p]]
            near = negatives
            if miner == "semi_hard":
                near = farther or [max(negatives, key=lambda n: d[a, n])]
            if miner == "semi_hard_within_margin":
                near = [n for n in farther if d[a, n] < d[a, p] + margin]
            if miner == "hardest":
                near = [n for n in negatives if d[a, n] < d[a, p] + margin]
            if near:
                expected[a, p] = min(near, key=lambda n: d[a, n])
    for name in KINDS:
        assert row[name] == pytest.approx(count[name] / sum(count.values()), abs=2e-4)  # float32 there, float64 here
    kinds = [kind(d[a, p], d[a, n], margin) for (a, p), n in expected.items()]
    for name in KINDS:
        assert row[f"picked_{name}"] == pytest.approx(kinds.count(name) / len(kinds), abs=2e-2)
    seen = Watcher(objective_for(config, open_sources(config.data.train, None), encoder))(vectors, batch)
    picked = seen.picked
    found = dict(zip(zip(picked.anchor.tolist(), picked.positive.tolist(), strict=True), picked.negative.tolist(), strict=True))
    same = [found.get(pair) == negative for pair, negative in expected.items()]
    assert np.mean(same) > 0.98
    assert abs(len(found) - len(expected)) <= 0.02 * len(expected)
    rows = (picked.anchor.numpy(), picked.negative.numpy())
    np.testing.assert_allclose(picked.d_an.numpy(), d[rows], atol=1e-3)
    assert len(set(picked.anchor[spread(picked)].tolist())) == 12


def test_a_run_is_shown_from_its_start_to_its_last_checkpoint(nearfar: Nearfar, digits: Path, tmp_path: Path) -> None:
    file = write(tmp_path, digits / "train", "{name: triplet, miner: semi_hard}")
    assert nearfar("train", file, "--local").code == 0
    page = (tmp_path / "runs" / "watched" / "report" / "mining.svg").read_text()
    assert "semi-hard" in page
    sheet = tmp_path / "picked.png"
    by_config, by_run = (
        nearfar("inspect", "--mining", which, "--sheet", sheet, "--json") for which in (file, tmp_path / "runs" / "watched")
    )
    assert by_run.code == by_config.code == 0, by_run.err
    told = json.loads(by_run.out)
    assert json.loads(by_config.out)["encoders"] == told["encoders"]
    assert [row["step"] for row in told["encoders"]] == [0, 2, 4]
    assert [row["step"] for row in told["logged"]] == [1, 2, 3, 4]
    for row in [*told["encoders"], *told["logged"]]:
        assert sum(row[name] for name in KINDS) == pytest.approx(1)
    first = told["logged"][0]  # the first step is made with the untrained encoder, from the very batch that is shown
    assert [first[name] for name in KINDS] == pytest.approx([told["encoders"][0][name] for name in KINDS], abs=0.01)
    with Image.open(sheet) as drawn:
        colours = {pixel for _, pixel in drawn.getcolors(1 << 24)}
    assert {(0xC6, 0x28, 0x28), (0xE0, 0xA1, 0x00), (0x2E, 0x8B, 0x57)} <= colours
    text = nearfar("inspect", "--mining", file).out
    assert "picked semi-hard" in text
    assert "while training" in text


def test_given_triplets_are_those_of_the_records(nearfar: Nearfar, tmp_path: Path) -> None:
    for seed in range(12):
        paint(seed).save(tmp_path / f"{seed}.png")
    lines = [
        "anchor,positive,negative0,negative1",
        *(f"{3 * i}.png,{3 * i + 1}.png,{3 * i + 2}.png,0.png" for i in range(1, 4)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    pack(tmp_path / "t.csv", tmp_path / "shards", kind="triplet")
    file = write(tmp_path, tmp_path / "shards", "{name: triplet}", batch=3, per_class="null")
    answer = nearfar("inspect", "--mining", file, "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["rules"]["miner"] == "given"
    (row,) = told["encoders"]
    assert row["picked"] == 6
    vectors, batch, _ = first_batch(load_config(file))
    counts = dict.fromkeys(KINDS, 0)
    for record in range(3):
        anchor, positive, *negatives = vectors[batch.record == record].double()
        for negative in negatives:
            counts[kind(float((anchor - positive).norm()), float((anchor - negative).norm()), 0.2)] += 1
    assert [row[name] for name in KINDS] == pytest.approx([counts[name] / 6 for name in KINDS])
    assert [row[f"picked_{name}"] for name in KINDS] == pytest.approx([row[name] for name in KINDS])


def test_what_cannot_be_shown_is_refused(nearfar: Nearfar, digits: Path, tmp_path: Path) -> None:
    file = write(tmp_path, digits / "train", "{name: triplet, miner: semi_hard}")
    for arguments, message in [
        ((), "give SHARDS"),
        (("--mining", file, "--duplicates"), "--mining goes with"),
        (("--mining", file, "--sheet", tmp_path / "sheet.gif"), ".png"),
        (("--mining", tmp_path / "nothing.yaml"), "nothing.yaml"),
        ((tmp_path / "empty", "--mining", file), "no folder"),
    ]:
        answer = nearfar("inspect", *arguments)
        assert answer.code == 2, (arguments, answer)
        assert message in answer.err, (arguments, answer)


def test_each_tower_embeds_its_own_members(tmp_path: Path) -> None:
    for number in range(24):
        place = tmp_path / "images" / f"c{number % 8}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        paint(number).save(place)
    pack(tmp_path / "images", tmp_path / "pairs", kind="pair", sample=Sample("random"))
    file = write(tmp_path, tmp_path / "pairs", "{name: triplet, miner: batch_hard}", batch=12, per_class="null")
    tower = "{name: convnet, dim: 8, patch: 2, widths: [8], blocks: 1, grid: 2}"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("encoder:")]
    file.write_text("\n".join([*lines, f"encoder: {{anchor: {tower}, positive: {tower}}}"]))
    config = load_config(file)
    with Loader(open_sources(config.data.train, None), config.data, seed=config.seed) as stream:
        batch = next(stream)
    torch.manual_seed(config.seed)
    towers = build_encoder(config.encoder, config.data.image_size).eval()
    images = augmented(config, torch.float32)(batch)
    with torch.no_grad():
        both = torch.stack([towers.anchor(images), towers.positive(images)])  # type: ignore[operator]
    vectors = both[(batch.view != 0).long(), torch.arange(len(images))]
    expected = Watcher(objective_for(config, open_sources(config.data.train, None), towers))(vectors, batch)
    row = inspect_mining(file)["encoders"][0]
    assert row["mean_d_ap"] == pytest.approx(expected.mean_d_ap, abs=1e-5)
    assert row["mean_d_an"] == pytest.approx(expected.mean_d_an, abs=1e-5)
    one = Watcher(objective_for(config, open_sources(config.data.train, None), towers))(both[0], batch)
    assert abs(one.mean_d_ap - expected.mean_d_ap) > 1e-3  # the other tower matters


def test_a_run_of_other_settings_is_left_out(nearfar: Nearfar, digits: Path, tmp_path: Path) -> None:
    file = write(tmp_path, digits / "train", "{name: triplet, miner: batch_hard}", batch=16, per_class="4")
    assert nearfar("train", file, "--local", "--set", "finish.onnx=false", "--set", "finish.report=false").code == 0
    assert [row["step"] for row in inspect_mining(file)["encoders"]] == [0, 2, 4]
    file.write_text(file.read_text().replace("miner: batch_hard", "miner: semi_hard"))
    found = inspect_mining(file)
    assert [row["step"] for row in found["encoders"]] == [0]
    assert "has other settings" in found["note"]
    assert [row["step"] for row in inspect_mining(tmp_path / "runs" / "watched")["encoders"]] == [0, 2, 4]
