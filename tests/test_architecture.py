"""The dependency direction and the lazy imports, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "configs": {"configs"},
    "pipelines": {"configs", "pipelines"},
    "trainer": {"configs", "pipelines", "trainer"},
    "cluster": {"configs", "pipelines", "trainer", "cluster"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
ONLY_IN_CLUSTER = {"ray", "mlflow"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_dependency_direction(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        if top in MAY_IMPORT:
            assert top in MAY_IMPORT[package], f"{path} imports {name}"
        # the exported model's own source is run by MLflow, so it may name it; the trainer never imports it
        if top in ONLY_IN_CLUSTER and path.name != "portable_model.py":
            assert package == "cluster", f"{path} imports {name}"
        if package == "trainer" and top == "pipelines":
            assert name == "pipelines.batch" or name.startswith("pipelines.batch."), f"{path} imports {name}"
        if name.startswith("torch.distributed"):
            assert path == ROOT / "trainer" / "collectives.py", f"{path} imports {name}"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["verify", "--help"], ["deploy", "kuberay", "--help"], ["recipes"]]
)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['nearfar', *{arguments!r}]\n"
        "import cluster.cli\n"
        "try: cluster.cli.main()\n"
        "except SystemExit as leaving: assert not leaving.code, leaving.code\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pyarrow', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]"


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 330}
    assert not long
