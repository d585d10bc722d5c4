"""A run tells the commit that it was started at, and whether files differed from it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster.description import git_tags


def git(folder: Path, *command: str) -> str:
    person = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *person, *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_told_and_changed_files_make_it_dirty(tmp_path: Path) -> None:
    assert git_tags(tmp_path) == {}
    git(tmp_path, "init", "-q")
    assert git_tags(tmp_path) == {}  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("2")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": "false"}
    (tmp_path / "a.py").write_text("3")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": "true"}
    assert git_tags(tmp_path / "nowhere") == {}
