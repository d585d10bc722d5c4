"""Two towers: each row by its own, in pieces as at once, and what cannot be is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import dump_config, parse_config
from configs.schema import Encoder, RunConfig
from pipelines.batch import Batch
from tests.trainer.test_backward import batch_of
from trainer.backward import backward, encode, pieces_of
from trainer.encoders import build_encoder
from trainer.encoders.stages import stage_numbers
from trainer.encoders.towers import Towers
from trainer.evaluate import embed
from trainer.objective import build_objective

CONVNET = {"name": "convnet", "dim": 6, "patch": 1, "widths": [8], "blocks": 1, "grid": 2}
IMAGES = {"anchor": CONVNET, "positive": {**CONVNET, "widths": [8, 16]}}
VECTORS = {"anchor": CONVNET, "positive": {"name": "projection", "dim": 6, "hidden": [7], "input_dim": 5}}
LOSSES = [
    {"name": "info_nce", "queries": "anchors", "candidates": "other_view", "symmetric": True, "learnable": True},
    {"name": "triplet", "miner": "batch_hard"},
]


def towers(section: dict[str, Any]) -> Towers:
    torch.manual_seed(3)
    encoder = build_encoder(Encoder.model_validate(section), 4)
    assert isinstance(encoder, Towers)
    with torch.no_grad():
        for p in encoder.parameters():  # else some begin at 0, and what is before them has no gradient
            p.add_(0.2 * torch.randn_like(p))
    return encoder.double()


def with_vectors(n: int = 24) -> Batch:
    """Pairs of an image and a vector of 5 numbers."""
    whole = batch_of(n, 2)
    given = torch.randn(n // 2, 5, generator=torch.Generator().manual_seed(2))
    place = torch.where(whole.view == 0, torch.arange(n) // 2, n // 2 + torch.arange(n) // 2)
    return replace(whole, images=whole.images[::2], draws=whole.draws[::2], vectors=given, place=place)


def batch_for(section: dict[str, Any], n: int = 24) -> Batch:
    return with_vectors(n) if section is VECTORS else batch_of(n, 2)


def by_hand(encoder: Towers, batch: Batch) -> Tensor:
    """One row after the other, each alone."""
    rows, images = [], batch.images.double() / 255
    for row, view in enumerate(batch.view.tolist()):
        at = row if batch.place is None else int(batch.place[row])
        tower = encoder.anchor if view == 0 else encoder.positive
        if at < len(images):
            rows.append(tower(images[at : at + 1]))
        else:
            assert batch.vectors is not None
            rows.append(tower(batch.vectors[at - len(images)][None].double()))
    return torch.cat(rows)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss["name"]))
@pytest.mark.parametrize("section", [IMAGES, VECTORS], ids=["images", "vectors"])
@pytest.mark.parametrize("micro_batch", [None, 1, 5])
def test_every_row_goes_through_its_own_tower(section: dict[str, Any], loss: dict[str, Any], micro_batch: int | None) -> None:
    encoder, batch, objective = towers(section), batch_for(section), build_objective(loss).double()
    other = copy.deepcopy(encoder)
    images = batch.images.double() / 255
    pieces = pieces_of(batch, micro_batch)
    keys = encode(other, images, pieces, None, batch)
    value, _ = backward(encoder, objective, images, batch, pieces=pieces)
    own = {"uid": batch.uid, "view": batch.view, "record": batch.record, "valid": batch.valid}
    rows = by_hand(other, batch)
    expected, _ = objective(rows, batch.group, **own)
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    for found, wanted in zip(encoder.parameters(), other.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert float(wanted.grad.abs().max()) > 0
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-13)
    placed = keys if batch.place is None else keys[batch.place]
    torch.testing.assert_close(placed, rows.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("section", [IMAGES, VECTORS], ids=["images", "vectors"])
def test_evaluation_gives_each_member_to_its_tower_and_single_images_to_the_anchor(section: dict[str, Any]) -> None:
    encoder, batch = towers(section), batch_for(section)
    found = embed(encoder, [batch], lambda one: one.images.double() / 255)
    torch.testing.assert_close(found.vectors, by_hand(encoder.eval(), batch).detach(), rtol=1e-12, atol=1e-14)
    images = batch.images[:3].double() / 255
    torch.testing.assert_close(encoder(images), encoder.anchor(images))


def test_explicit_negatives_are_of_the_positives_sort() -> None:
    encoder, batch = towers(IMAGES), batch_of(24, 3)
    found = encode(encoder, batch.images.double() / 255, pieces_of(batch, 3), None, batch)
    torch.testing.assert_close(found, by_hand(encoder, batch).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("view", [0, 1])
def test_a_tower_without_rows_has_gradient_zero_not_none(view: int) -> None:
    encoder = towers(IMAGES)
    batch = replace(batch_of(4, 1), view=torch.full((4,), view))
    backward(encoder, build_objective({"name": "sup_con"}).double(), batch.images.double() / 255, batch)
    idle = encoder.positive if view == 0 else encoder.anchor
    grads = [p.grad for p in idle.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_the_last_stages_of_both_towers_learn_at_one_rate() -> None:
    encoder = towers(IMAGES)
    stage = stage_numbers(encoder)
    ends = {max(stage[f"{side}.{name}"] for name, _ in getattr(encoder, side).named_parameters()) for side in IMAGES}
    assert len(ends) == 1
    assert stage["anchor.body.0.weight"] > stage["positive.body.0.weight"] == 0  # the shorter one begins later


def test_freezing_is_each_towers_own() -> None:
    encoder = towers({**IMAGES, "anchor": {**CONVNET, "freeze": 1}})
    assert not encoder.anchor.get_parameter("body.0.weight").requires_grad
    assert all(p.requires_grad for p in encoder.positive.parameters())


def config(encoder: Any, *overrides: str) -> RunConfig:
    settings = {"name": "x", "data": {"train": "nowhere"}, "train": {"steps": 1}, "encoder": encoder}
    return parse_config(settings, overrides)


def test_the_section_is_read_set_and_written() -> None:
    found = config(IMAGES, "encoder.anchor.dim=64")
    assert found.encoder.parts()["encoder.anchor"].options["dim"] == 64
    assert "anchor:" in dump_config(found)
    assert "anchor" not in dump_config(config(CONVNET))
    assert set(found.model_dump(mode="json")["encoder"]) == {"anchor", "positive"}
    assert RunConfig.model_validate(found.model_dump(mode="json")) == found
    assert found.identity()["encoder"] != config(IMAGES).identity()["encoder"]


MISTAKES = [
    ({**IMAGES, "name": "convnet"}, "'name' beside 'anchor'"),
    ({"anchro": CONVNET, "positive": CONVNET}, "did you mean 'anchor'?"),
    ({"anchor": CONVNET}, "give both anchor and positive"),
    ({"name": "towers"}, "two networks are given as"),
    ({**IMAGES, "anchor": {"dim": 4}}, "encoder.anchor.name: required"),
    ({**IMAGES, "anchor": {**CONVNET, "init_skip": ["head"]}}, "there is no encoder.anchor.init"),
]
UNBUILDABLE = [
    ({**IMAGES, "anchor": {**CONVNET, "dim": 8}}, "encoder.positive.dim is 6, but encoder.anchor.dim is 8"),
    ({**IMAGES, "anchor": {**CONVNET, "wides": [8]}}, "encoder.anchor.wides: .*did you mean 'widths'"),
    ({**IMAGES, "positive": {**CONVNET, "widths": [3]}}, "encoder.positive.widths: one multiple of 8"),
    ({**IMAGES, "anchor": VECTORS["positive"]}, "encoder.anchor.name: anchors are images"),
    ({**IMAGES, "positive": {"name": "projection"}}, "encoder.positive.input_dim: the data has no vectors"),
    ({"name": "projection", "input_dim": 3}, "encoder.name: 'projection' encodes vectors"),
    ({**IMAGES, "anchor": IMAGES}, "encoder.anchor.name: required"),
]


@pytest.mark.parametrize(("section", "told"), MISTAKES)
def test_a_section_that_means_nothing_is_refused(section: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config(section)


@pytest.mark.parametrize(("section", "told"), UNBUILDABLE)
def test_towers_that_cannot_be_built_name_the_setting(section: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_encoder(config(section).encoder, 4)


def test_members_of_the_wrong_sort_are_refused() -> None:
    images = torch.zeros(2, 3, 4, 4).double()
    with pytest.raises(ValueError, match=r"encoder.positive takes vectors, but here are images"):
        towers(VECTORS)(images, other=torch.tensor([False, True]))
    with pytest.raises(ValueError, match=r"encoder.positive takes images, but here are vectors"):
        towers(IMAGES)(images, other=torch.tensor([False, True]), vectors=torch.zeros(2, 5))
    batch = with_vectors()
    turned = replace(batch, view=1 - batch.view)
    with pytest.raises(ValueError, match=r"encoder.anchor takes images, but here are anchors that are vectors"):
        encode(towers(VECTORS), batch.images.double(), None, None, turned)
