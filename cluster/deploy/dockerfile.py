"""An image of nearfar for a config: its Dockerfile, and what may enter the build."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.deploy.pods import USER
from cluster.runfolder import write_atomically
from configs.schema import RunConfig

SOURCES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "configs", "pipelines", "trainer", "cluster")
ON_PATH = ("bash", "wget", "python", "ray", "nearfar")  # KubeRay starts Ray by bash, and asks for its health by wget
BASE = "slim-bookworm"


def dockerfile(config: RunConfig) -> str:
    """To be built in the folder of nearfar's sources."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    package = f"'.[{','.join(extras_of(config))}]'" if extras_of(config) else "."
    files, folders = [s for s in SOURCES if "." in s or s.isupper()], [s for s in SOURCES if "." not in s and not s.isupper()]
    copies = "\n".join(f"COPY {folder} {folder}" for folder in folders)
    return f"""\
# syntax=docker/dockerfile:1
# In the folder of nearfar's sources: docker build -f Dockerfile -t REGISTRY/nearfar:TAG .
# The Python of those who submit, which Ray wants to be that of the cluster. torch's wheels bring CUDA and NCCL along; GPU nodes
# need their driver and the NVIDIA container toolkit only.
ARG PYTHON={python}
FROM python:${{PYTHON}}-{BASE}

# tini hands signals on and collects orphans. The others must be on PATH: {", ".join(ON_PATH)}. In a pod bash starts
# Ray; from 5.1 on it gives Ray its own place, so that Ray hears the SIGTERM of a pod that must go.
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends bash tini wget \\
 && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/nearfar
COPY {" ".join(files)} ./
{copies}
# A private index comes as a secret, which no layer keeps: docker build --secret id=pip,src=pip.conf ...
RUN --mount=type=secret,id=pip,target=/etc/pip.conf pip install --constraint constraints.txt {package}

RUN useradd --create-home --uid {USER} nearfar
USER {USER}
WORKDIR /home/nearfar
RUN set -e; for program in {" ".join(ON_PATH)}; do command -v "$program"; done; nearfar --help > /dev/null

ENTRYPOINT ["tini", "--"]
CMD ["nearfar", "--help"]
"""


def dockerignore() -> str:
    """Nothing enters but what the Dockerfile copies: no data, no runs, no secrets."""
    return "\n".join(["*", *(f"!{source}" for source in SOURCES), "**/__pycache__"]) + "\n"


def write(config: RunConfig, folder: Path) -> list[Path]:
    """Both files into `folder`. Raises ValueError rather than overwrite a file that says something else."""
    files = {folder / "Dockerfile": dockerfile(config), folder / ".dockerignore": dockerignore()}
    for path, text in files.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} is there and says something else; move it away, or name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_atomically(path, text)
    return list(files)


def extras_of(config: RunConfig) -> list[str]:
    """The extras of the package that this config needs."""
    networks = {part.name for part in config.encoder.parts().values()} & {"timm", "transformers"}
    found = [*(["onnx"] if config.finish.onnx else []), *networks]
    return sorted([*found, *(["s3"] if any(place.startswith("s3://") for place in _places(config)) else [])])


def _places(config: RunConfig) -> Iterator[str]:
    yield from (source.path for source in config.data.train)
    yield from (place for place in (config.data.eval, config.evaluate.gallery, config.cluster.checkpoints) if place is not None)
