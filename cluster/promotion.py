"""Who gets an alias of a registered model: the better version, also when several are promoted at the same time."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from configs.evaluation import goodness

logger = logging.getLogger(__name__)

WAITING, PROMOTED, KEPT, GONE = "waiting", "promoted", "not better", "given up"
PATIENCE_S = 30.0  # for a version that was to be promoted before ours; its turn takes a fraction of a second
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Registered:
    """A version of a registered model; `promoted` tells whether `alias` points to it now, `holder` who had it before."""

    name: str
    version: str
    alias: str
    promoted: bool
    holder: str | None

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.name}@{self.alias}" if self.promoted else f"models:/{self.name}/{self.version}"


def check_model_name(name: str) -> None:
    """Raise ValueError for a name that the registry would refuse after hours of training."""
    if not name.strip() or "/" in name or ":" in name:
        raise ValueError(f"{name!r} is no model name (tracking.register): it may not be empty or hold '/' or ':'")
    if "'" in name and '"' in name:
        raise ValueError(
            f"{name!r} (tracking.register) cannot be searched for in MLflow: leave out one kind of quotation marks"
        )


def ticket(alias: str) -> dict[str, str]:
    """Tags that a version must be created with for `promote`: it then waits in line from its first moment on."""
    return {_turn(alias): WAITING}


def promote(client: Any, name: str, version: str, *, alias: str, metric: str, force: bool = False) -> Registered:
    """Give `alias` to `version` if nobody has it, if `metric` of its tags is better than the holder's, or if `force`.

    Reading the holder and moving the alias are two requests, and MLflow has none that does both. Two promotions that run
    between each other could leave the alias with the worse version. So they take turns, as with numbered tickets: the registry
    gives out the version numbers one by one, and a version is created together with its tag `promotion.ALIAS = waiting`. Who
    sees no lower number still waiting has the turn, compares, moves the alias and takes the tag away from `waiting`. All that
    a turn needs is in the registry, so the processes may be on different machines. One that dies in line is given up after
    PATIENCE_S, by a tag that it would see before it moved the alias.
    """
    _wait_for_turn(client, name, version, alias)
    holder = _holder(client, name, alias)
    mine = client.get_model_version(name, version)
    better = holder is None or force or _goodness(mine, metric) > _goodness(holder, metric)
    if mine.tags.get(_turn(alias)) != WAITING:
        raise RuntimeError(
            f"version {version} of {name!r} waited too long for {alias!r}, and others went past; promote it again"
        )
    if better:
        client.set_registered_model_alias(name, alias, version)
    client.set_model_version_tag(name, version, _turn(alias), PROMOTED if better else KEPT)
    return Registered(name, version, alias, better, None if holder is None else str(holder.version))


def _wait_for_turn(client: Any, name: str, version: str, alias: str) -> None:
    ahead: list[str] = []
    since = time.monotonic()
    while True:
        before, ahead = ahead, _ahead(client, name, version, alias)
        if not ahead:
            return
        if ahead != before:
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            logger.warning("version %s of %r was never promoted to %r: its process is gone", ahead[0], name, alias)
            client.set_model_version_tag(name, ahead[0], _turn(alias), GONE)
        time.sleep(POLL_S)


def _ahead(client: Any, name: str, version: str, alias: str) -> list[str]:
    """Lower versions that wait, lowest first."""
    mark = '"' if "'" in name else "'"
    versions = client.search_model_versions(f"name = {mark}{name}{mark}", max_results=1000, order_by=["version_number DESC"])
    waiting = [int(one.version) for one in versions if one.tags.get(_turn(alias)) == WAITING]
    return [str(number) for number in sorted(waiting) if number < int(version)]


def _holder(client: Any, name: str, alias: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # sqlite answers with the second
            return None
        raise


def _goodness(version: Any, metric: str) -> float:
    """Larger for better values of the metric it was registered with; one registered elsewhere has none and gives way."""
    value = float(version.tags.get(f"metric.{metric}", math.nan))
    return -math.inf if math.isnan(value) else goodness(metric, value)


def _turn(alias: str) -> str:
    return f"promotion.{alias}"
