"""Every start of a run is told, with why the one before it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import attempts
from cluster.resume import histories_of, refuse_other
from cluster.runfolder import RunFolder, read_lines
from configs.load import load_config
from configs.schema import RunConfig
from pipelines.mixture import open_sources
from trainer.checkpoints import Saved
from trainer.stores import FolderStore


def begin(folder: RunFolder, launch: str = "a", skipped: tuple[str, ...] = ()) -> None:
    attempts.begin(folder, launch=launch, world=2, from_step=3, skipped=skipped, more={"device": "cpu"})


def test_a_start_tells_why_the_one_before_ended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    begin(folder)
    attempts.ended(tmp_path, "rank 0: connection closed")
    attempts.ended(tmp_path, "rank 2: connection closed")  # an echo
    begin(folder, skipped=("step-5 is damaged",))
    attempts.ended(tmp_path, "rank 0: connection closed")
    attempts.ended(tmp_path, "process 1 terminated with signal SIGKILL", sure=True)
    begin(folder, launch="b")
    begin(folder, launch="c")
    rows = list(read_lines(folder.attempts))
    assert [row["last_ended"] for row in rows] == [
        *(None, "rank 0: connection closed", "process 1 terminated with signal SIGKILL"),
        attempts.NO_WORD,
    ]
    assert [row["launch"] for row in rows] == ["a", "a", "b", "c"]
    assert rows[1]["skipped"] == ["step-5 is damaged"]
    assert (rows[0]["world"], rows[0]["from_step"], rows[0]["device"]) == (2, 3, "cpu")
    assert rows[0]["time"] <= rows[1]["time"]
    assert attempts.begun(folder, "a")
    assert not attempts.begun(folder, "d")


def config_of(**train: object) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "data": {"train": "x"}, "train": {"steps": 9, **train}})


def saved_of(identity: dict[str, object]) -> Saved:
    return Saved(1, 1, identity, store=FolderStore(Path("/runs/x/checkpoints")), files={})


def test_a_setting_that_a_checkpoint_does_not_know_counts_as_left_at_its_default() -> None:
    from cluster.resume import identity

    before = identity(config_of())
    del before["train"]["ema"]
    refuse_other(saved_of(before), config_of())
    with pytest.raises(ValueError, match=r"train.ema: 0.0 -> 0.9"):
        refuse_other(saved_of(before), config_of(ema=0.9))
    with pytest.raises(ValueError, match=r"checkpoints/step-00000001 cannot be resumed.*\n  train.momentum: 0.0 -> 0.5"):
        refuse_other(saved_of(identity(config_of())), config_of(momentum=0.5))


def test_a_run_whose_checkpoints_are_elsewhere_does_not_begin_anew_silently(config_file: Path, tmp_path: Path) -> None:
    here = load_config(config_file)
    there = load_config(config_file, ["cluster.checkpoints=memory://empty"])
    folder = RunFolder.of(here)
    folder.claim(here)
    manifest = open_sources(here.data.train, None)
    histories_of(here, folder, manifest)
    with pytest.raises(ValueError, match=r"cluster.checkpoints: there is none in memory://empty/small.*copy them first"):
        histories_of(there, folder, manifest)


def test_a_run_folder_behind_a_url_is_refused_with_what_to_do(config_file: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster\.storage.*cluster\.checkpoints"):
        load_config(config_file, ["cluster.storage=s3://bucket/runs"])
