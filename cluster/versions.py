"""Versions of what decides the numbers: a worker with others would compute something else, or fail far from the cause."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from configs.errors import Unrecoverable

PACKAGES = ("nearfar", "torch", "numpy")


def installed() -> dict[str, str]:
    """Of Python (major and minor) and of PACKAGES here; builds of one version (+cpu, +cu130) count as the same."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:  # run from a folder of sources
            continue
    return found


def refuse_skew(expected: Mapping[str, str]) -> None:
    """Raise Unrecoverable when what runs here is not what the driver has."""
    here = installed()
    wrong = [name for name in expected if here.get(name, expected[name]) != expected[name]]
    other = [f"{name} {here[name]} instead of {expected[name]}" for name in wrong]
    if other:
        raise Unrecoverable(
            f"node {platform.node()} has {', '.join(other)}, which the driver has; install the same there, or start from a "
            "machine with these versions"
        )
