"""What the README says under "Add a loss" is done here, word for word."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from trainer import collectives
from trainer.objective import build_objective

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("## Add a loss\n")[1].split("\n## ")[0]
CODE, REGISTRY_LINE = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
COMMANDS = [line[2:] for line in re.findall(r"```console\n(.*?)```", SECTION, re.DOTALL)[0].splitlines()]


@pytest.fixture
def folder(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: their config and the README's code in a file of the name it gives."""
    assert "`ranking.py`" in SECTION
    (tmp_path / "ranking.py").write_text(CODE)
    config_file.rename(tmp_path / "mine.yaml")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("ranking", None)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(21, 5, generator=generator, dtype=torch.float64), torch.arange(21) % 6


def gradients() -> tuple[float, Tensor, Tensor]:
    """Value, gradient of this rank's rows and of the scale, as the README's loss gives them."""
    x, group = batch()
    share = {1: [slice(None)], 2: [slice(8), slice(8, None)]}[collectives.world()][collectives.rank()]
    objective = build_objective({"name": "ranking:Ranking", "scale": 7.0}).double()
    mine = x[share].requires_grad_()
    value, _ = objective(mine, group[share], uid=torch.arange(21)[share])
    value.backward()
    assert mine.grad is not None
    return float(value.detach()), mine.grad / collectives.world(), next(objective.parameters()).grad  # type: ignore[return-value]


def loops() -> tuple[float, Tensor, Tensor]:
    """The same from the docstring's formula, term by term."""
    x, group = batch()
    leaf, scale = x.requires_grad_(), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    s = F.normalize(leaf) @ F.normalize(leaf).T
    terms = [
        torch.log1p(torch.exp(scale * (s[a][group != group[a]].max() - s[a, p])))
        for a in range(21)
        for p in range(21)
        if a != p and group[a] == group[p]
    ]
    value = torch.stack(terms).mean()
    value.backward()
    assert leaf.grad is not None
    assert scale.grad is not None
    return float(value.detach()), leaf.grad, scale.grad


@pytest.mark.usefixtures("folder")
def test_the_loss_is_its_formula_on_one_process_and_on_two_ranks() -> None:
    assert importlib.import_module("ranking").Ranking.__doc__ is not None
    value, grad, scale_grad = loops()
    for ranks in ([gradients()], run_ranks(2, gradients)):
        joined = torch.cat([rank[1] for rank in ranks])
        assert ((joined - grad).norm() / grad.norm()) < 1e-10
        for rank in ranks:
            assert rank[0] == pytest.approx(value, rel=1e-10)
            assert float(rank[2]) == pytest.approx(float(scale_grad), rel=1e-8)


def test_the_commands_check_and_train_it(folder: Path) -> None:
    bin_folder = Path(sys.executable).parent
    script = "\n".join(["set -e", *COMMANDS]).replace("train mine.yaml", "train mine.yaml --set train.steps=6")
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ranking:Ranking on 2 ranks against one process" in done.stdout
    assert "no relative error is above 1e-06" in done.stdout
    assert (folder / "runs/small/result.json").exists()


def test_one_file_and_one_registry_line_give_it_a_name(folder: Path) -> None:
    tree = folder / "tree"
    for package in ("configs", "pipelines", "trainer", "cluster"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.move(folder / "ranking.py", tree / "trainer/losses/ranking.py")
    registry = tree / "configs/registry.py"
    head, losses, tail = registry.read_text().partition('    "loss": {\n')
    assert losses
    registry.write_text(f"{head}{losses}        {REGISTRY_LINE}{tail}")
    command = [sys.executable, "-m", "cluster.cli", "check", str(folder / "mine.yaml"), "--exact"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [*command, "--set", "loss={name: ranking, scale: 20}"], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ranking on 2 ranks against one process" in done.stdout
