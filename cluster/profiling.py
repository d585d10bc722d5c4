"""Profiles some steps of a run on every rank: torch's trace, and the time of each part of a step by this rank's clock.

Nothing that is computed changes. On a GPU each part is waited for, so that its time is its own: parts that overlap otherwise do
not, and the step is slower than unprofiled.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from cluster.profile_table import FILE, OTHER, WARM_UP, RankTimes, StepTimes
from cluster.runfolder import write_atomically
from trainer import collectives, ranges

logger = logging.getLogger(__name__)


class Profile:
    """Watches `steps` steps, once WARM_UP after step `start` are done. As a context it ends what it has begun."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        *,
        start: int,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        nodes: Sequence[str],
    ) -> None:
        """`folder`: RUN/profile; `nodes`: of every rank; `parameters`: those whose gradients DDP adds up."""
        self._folder, self._steps, self._device, self._nodes = folder, steps, device, nodes
        self._first = start + WARM_UP  # the last step before
        self._clock = _Clock(device)
        hook = self._clock.arrived
        learning = [p for p in parameters if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in learning]  # type: ignore[no-untyped-call]
        self._running = ExitStack()
        self._trace: profile | None = None
        self._began, self._done = 0.0, False

    def beat(self, step: int) -> None:
        """After each step. Collective when the last one to watch is done."""
        if step == self._first and self._steps:
            self._begin()
        elif step == self._first + self._steps and self._trace is not None:
            self._finish(self._trace)

    def _begin(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it tells of its start and end otherwise
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        self._trace = self._running.enter_context(profile(activities=activities))
        self._running.enter_context(ranges.watched(self._clock.part))
        self._began = self._clock.now()

    def _finish(self, trace: profile) -> None:
        seconds = self._clock.now() - self._began
        self._done = True
        self.close()
        name = f"rank-{collectives.rank()}.json.gz"
        per_step = [1000 * t / self._steps for t in (seconds, *(self._clock.spent[part] for part in ranges.PARTS))]
        mine = torch.tensor([per_step], dtype=torch.float64, device=self._device)
        every = collectives.gather(mine, [1] * collectives.world()).tolist()
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}"  # its end tells torch to compress
        trace.export_chrome_trace(str(temporary))
        temporary.replace(self._folder / name)
        if collectives.rank() == 0:
            times = StepTimes(
                self._first + 1, self._steps, str(self._device.type), [self._row(i, row) for i, row in enumerate(every)]
            )
            write_atomically(self._folder / FILE, json.dumps(times.as_dict(), indent=1))

    def _row(self, rank: int, numbers: list[float]) -> RankTimes:
        step, *parts = numbers
        named = {**dict(zip(ranges.PARTS, parts, strict=True)), OTHER: step - sum(parts)}
        return RankTimes(rank, self._nodes[rank], f"rank-{rank}.json.gz", step, named)

    def close(self) -> None:
        """Watch no longer."""
        self._running.close()
        self._trace = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._steps and not self._done and kind is None and collectives.rank() == 0:
            logger.warning("the run ended before %d steps could be profiled: there is no table", self._steps)
        self.close()


class _Clock:
    """Seconds in each part, without those of parts inside it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.spent = dict.fromkeys(ranges.PARTS, 0.0)
        self._open: list[list[float]] = []  # (began, of parts inside) of each part that is open
        self._arrived = float("-inf")
        self._event = _event() if self._cuda else None

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def part(self, name: str) -> _Part:
        return _Part(self, name)

    def arrived(self, _parameter: Tensor) -> None:
        """A gradient of this rank is there; what backward does after the last one is waiting for those of others."""
        if self._event is not None:
            self._event.record()
        self._arrived = time.perf_counter()

    def enter(self) -> None:
        self._open.append([self.now(), 0.0])

    def leave(self, name: str) -> None:
        waited = self._since_arrival() if name == ranges.BACKWARD and collectives.world() > 1 else 0.0
        began, inside = self._open.pop()
        seconds = self.now() - began
        if waited < seconds - inside:  # else the last gradient came in an earlier backward
            self.spent[ranges.REDUCE] += waited
            inside += waited
        self.spent[name] += seconds - inside
        if self._open:
            self._open[-1][1] += seconds

    def _since_arrival(self) -> float:
        if self._event is None or self._arrived < 0:
            return time.perf_counter() - self._arrived
        end = _event()
        end.record()  # behind the all-reduce, for which the stream of the gradients waits
        end.synchronize()
        return float(self._event.elapsed_time(end)) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Part:
    __slots__ = ("_clock", "_name", "_range")

    def __init__(self, clock: _Clock, name: str) -> None:
        self._clock, self._name, self._range = clock, name, record_function(name)

    def __enter__(self) -> None:
        self._range.__enter__()  # type: ignore[no-untyped-call]
        self._clock.enter()

    def __exit__(self, *error: object) -> None:
        self._clock.leave(self._name)
        self._range.__exit__(*error)
