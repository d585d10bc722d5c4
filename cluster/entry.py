"""What a submitted job runs: `python -m cluster.entry CONFIG [--resume]`, train the config on the cluster that this runs in.

A run that exists goes on only with --resume; with --resume one that does not exist begins.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MISTAKE = 2


def main(config: str, *options: str) -> int:
    """The exit code: that of `nearfar train`."""
    lacking = missing(Path(config).with_name("nearfar-requirements.json"))
    if lacking:
        print(
            f"nearfar: this cluster lacks {', '.join(lacking)}: use an image that has them (`nearfar deploy dockerfile` makes "
            "one), or install them on every node",
            file=sys.stderr,
        )
        return MISTAKE
    from cluster import cli
    from cluster.runfolder import RunFolder
    from configs.load import load_config

    resume = "--resume" in options
    try:
        resume = resume and RunFolder.of(load_config(config)).exists()
    except ValueError:
        resume = False  # `train` tells what is wrong with it
    sys.argv = ["nearfar", "train", config, "--address", "auto", *(option for option in options if option != "--resume")]
    sys.argv += ["--resume"] if resume else []
    cli.main()
    return 0


def missing(requirements: Path) -> list[str]:
    """What of a file's `name>=version` lines is not installed here, or in another version."""
    if not requirements.exists():
        return []
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    found = []
    for line in json.loads(requirements.read_text(encoding="utf-8")):
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            have = version(wanted.name)
        except PackageNotFoundError:
            found.append(f"{wanted.name}{wanted.specifier}")
            continue
        if not wanted.specifier.contains(have, prereleases=True):
            found.append(f"{wanted.name}{wanted.specifier} (it has {have})")
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
