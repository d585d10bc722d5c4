"""What a run goes on from: the same settings, and the same data or, where that is accepted, data that has grown."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from cluster.runfolder import RunFolder, flat, refuse_changes
from configs.registry import resolve
from configs.schema import RunConfig
from pipelines import growth
from pipelines.growth import History
from pipelines.manifest import ORDER_VERSION, Manifest
from trainer import checkpoints
from trainer.checkpoints import Saved
from trainer.stores import Store

_DEFAULTS = RunConfig.model_validate({"name": "defaults", "data": {"train": "."}, "train": {"steps": 1}})
logger = logging.getLogger(__name__)


def identity(config: RunConfig) -> dict[str, Any]:
    """All that decides what a run computes, but for the data itself."""
    return {**config.identity(), "order_version": ORDER_VERSION}


def refuse_other(saved: Saved, config: RunConfig) -> None:
    """Raise ValueError when `saved` is of a run that computes something else.

    Settings that were not there yet when it was written count as left at their default.
    """
    defaults = _DEFAULTS.identity()
    if "anchor" in saved.identity["encoder"]:  # towers have settings of their own, none of those of one network
        del defaults["encoder"]
    known, defaults = flat(saved.identity), flat(defaults)
    new = {key: value for key, value in defaults.items() if not any(key == k or key.startswith(f"{k}.") for k in known)}
    refuse_changes(saved.location, {**new, **known}, identity(config))


def _refuse_elsewhere(config: RunConfig, folder: RunFolder, store: Store) -> None:
    was = folder.config().cluster.checkpoints if folder.exists() else config.cluster.checkpoints
    if was != config.cluster.checkpoints:
        raise ValueError(
            f"cluster.checkpoints: there is none in {store.location}; those of this run went to "
            f"{was or folder.path / 'checkpoints'}: name that place again, or copy them first"
        )


def histories_of(
    config: RunConfig, folder: RunFolder, manifest: Manifest, *, accept_new_data: bool = False
) -> tuple[History, ...]:
    """Of every source, from the newest checkpoint on; of all that they hold where there is none yet.

    Raises ValueError that says what is not as it was.
    """
    store = folder.checkpoints(config)
    try:
        found = checkpoints.search(store)
    except OSError as error:
        setting = "cluster.storage" if config.cluster.checkpoints is None else "cluster.checkpoints"
        raise RuntimeError(f"{setting}: {error}") from error
    for reason in found.skipped:
        logger.warning("checkpoint passed over: %s", reason)
    saved = found.saved
    if saved is None:
        _refuse_elsewhere(config, folder, store)
        return growth.begin(manifest)
    refuse_other(saved, config)
    before = [History.from_dict(source) for source in saved.sources]
    after = growth.follow(before, manifest, config.data, saved.position, accept=accept_new_data)
    _refuse_new_classes(config, before, after)
    return after


def _refuse_new_classes(config: RunConfig, before: Sequence[History], after: Sequence[History]) -> None:
    """Raise ValueError when a loss has a centre for each class and now there are more of them."""
    new = sum(late.num_classes - early.num_classes for early, late in zip(before, after, strict=True))
    fixed = [part.name for part in config.loss if hasattr(resolve("loss", part.name), "set_classes")]
    if new and fixed:
        raise ValueError(
            f"the new data brings {new} more classes, but loss {fixed[0]!r} has a centre for each class it began with; "
            "start a new run with it, or go on with new images of the old classes only"
        )
