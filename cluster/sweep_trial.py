"""A trial of a sweep as a process of its own: `nearfar train --local --resume`, told what it is part of."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cluster.description import Description
from cluster.lock import Held, Lock
from cluster.run import Interrupted, JobFailed, train
from cluster.runfolder import RunFolder
from cluster.sweep_state import noted_end
from cluster.sync import sync
from configs.load import parse_config
from configs.schema import RunConfig

ENDED_TAG = "nearfar.sweep.ended"
TRY_AGAIN = 75  # as sysexits.h has it: no failure of the trial's own
PREDECESSOR_S = 60.0  # a trial whose driver was killed ends within seconds
logger = logging.getLogger(__name__)


def main() -> int:
    """Train the config on stdin; the exit code of `nearfar train`. The one argument is the id of the process that waits."""
    _end_with(int(sys.argv[1]))
    told = json.load(sys.stdin)
    config = parse_config(told["config"])
    run = Path(config.cluster.storage) / config.name
    _alone(run)
    try:
        train(config, local=True, resume=True, tags=told["tags"])
    except (ValueError, JobFailed) as error:
        print(f"nearfar: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"nearfar: {error}", file=sys.stderr)
        settle(config, run)
        return error.exit_code
    except (KeyboardInterrupt, RuntimeError) as error:
        print(f"nearfar: {error or 'interrupted'}", file=sys.stderr)
        return 1
    return 0


def settle(config: RunConfig, run: Path) -> None:
    """Where the sweep has stopped the trial, say so in its result, and once in MLflow: a tag beside the status KILLED."""
    end, folder = noted_end(run), RunFolder(run)
    if end.get("status") != "STOPPED" or (folder.result() or {}).get("status") == "FINISHED":
        return
    if folder.result() is None:  # its driver was killed before it could tell
        folder.write_result({"status": "KILLED"})
    if config.tracking.enabled and folder.exists():
        about = Description.read(folder.description)
        if ENDED_TAG in about.tags:
            return
        replace(about, tags={**about.tags, ENDED_TAG: end["reason"]}).write(folder.description)
        with suppress(ValueError, OSError, RuntimeError):  # `nearfar track sync` brings what is missing
            sync(run, progress=lambda done, total: None)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the one that waits for it dies, as it does with local ranks."""
    if sys.platform == "linux":
        from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

        _prctl_pr_set_pdeathsig(signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)


def _alone(run: Path) -> None:
    """Hold the trial as long as this process lives; wait for one of an earlier driver to be gone."""
    run.mkdir(parents=True, exist_ok=True)
    lock, deadline = Lock(run / ".trial.lock"), time.monotonic() + PREDECESSOR_S
    while True:
        try:
            lock.take()
            return
        except Held as error:
            if time.monotonic() > deadline:
                print(f"nearfar: the trial is still being trained by {error.holder}", file=sys.stderr)
                raise SystemExit(TRY_AGAIN) from error
            time.sleep(0.5)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    sys.exit(main())
