"""The memory that a worker will need, and weights that are refused before they are made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cluster import estimate
from cluster.estimate import allowance, refuse_too_much
from cluster.memory import machine_bytes
from configs.load import parse_config
from trainer.encoders.convnet import ConvNet


def test_shapes_alone_give_what_a_trial_gives() -> None:
    encoder = ConvNet(24, dim=8, widths=(8, 16), blocks=1)
    tried = estimate._kept(encoder, 24, "cpu", most=None)
    assert tried == estimate._kept(ConvNet(24, dim=8, widths=(8, 16), blocks=1).to("meta"), 24, "meta", most=None) > 0
    with pytest.raises(estimate._TooMuch):
        estimate._kept(encoder, 24, "cpu", most=1000)


def test_weights_that_cannot_be_trained_are_refused_before_they_are_made() -> None:
    side = int((machine_bytes() / 8) ** 0.5)  # in fp32 half of the memory
    with pytest.raises(ValueError, match=r"GB of memory let one train: encoder\.width 5; lower"), allowance("encoder.width 5"):
        nn.Linear(side, side)
    with allowance("encoder.width 5"):
        assert torch.zeros(3).sum() == 0


def test_too_much_memory_is_told_with_the_settings_that_take_most_of_it() -> None:
    config = parse_config({"name": "a", "data": {"train": "x"}, "train": {"steps": 1}})
    refuse_too_much(config, {"data.batch": 1})
    with pytest.raises(ValueError, match=r"1e\+09 GB of memory.*1e\+09 GB for data\.batch; lower") as caught:
        refuse_too_much(config, {"data.batch": 10**18, "encoder.dim": 10**10})
    assert "encoder.dim" not in str(caught.value)
