"""The parts of the reproducible mode that need no other rank."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cluster.runfolder import note_hash, read_lines
from configs.schema import RunConfig
from trainer import reproducible
from trainer.encoders.convnet import _pooled


def test_the_hash_is_of_all_tensors_in_the_order_of_their_names() -> None:
    weight, step = torch.arange(6.0).view(2, 3), torch.tensor(3)
    expected = hashlib.sha256()
    for name, tensor in (("a.w", weight), ("b.step", step)):
        expected.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    found = reproducible.hash_of({"b": {"step": step}, "a": {"w": weight}})
    assert found == expected.hexdigest()[:16]
    laid_out_otherwise = weight.T.contiguous().T
    assert reproducible.hash_of({"a": {"w": laid_out_otherwise}, "b": {"step": step}}) == found
    nearly = torch.nextafter(weight, torch.tensor(9.0))
    assert reproducible.hash_of({"a": {"w": nearly}, "b": {"step": step}}) != found


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (3, 4)])
def test_deterministic_pooling_is_adaptive_pooling(size: tuple[int, int]) -> None:
    features = torch.randn(2, 4, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with reproducible.kernels():
        found = _pooled(features, 3)
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(features, 3))


def test_the_mode_leaves_the_process_as_it_was() -> None:
    threads = torch.get_num_threads()
    with reproducible.kernels():
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_step_done_again_with_other_weights_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "hashes.jsonl"
    for weights in ("aa", "aa"):
        note_hash(file, 20, weights)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        note_hash(file, 20, "bb")
    assert "step 20: the weights are bb, but were aa" in caplog.text
    assert [row["weights"] for row in read_lines(file)] == ["aa", "bb"]


def test_pieces_decide_what_a_reproducible_run_computes_and_only_that() -> None:
    def identity(**train: object) -> object:
        tree = {"name": "x", "data": {"train": "x", "batch": 64}, "train": {"steps": 2, **train}}
        return RunConfig.model_validate(tree).identity()

    assert identity(micro_batch=4) == identity()
    equal = identity(reproducible=True, micro_batch=4)
    assert equal == identity(reproducible=True, micro_batch=4, log_every=1)
    assert equal != identity(reproducible=True, micro_batch=8)
    assert equal != identity()
