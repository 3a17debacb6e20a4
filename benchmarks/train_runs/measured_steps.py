"""Steps of a run in phases: alone and next to a busy process in turn, then profiled."""

import contextlib
from collections.abc import Mapping
from statistics import median

from torch.profiler import ProfilerActivity, profile

from benchmarks.busy_loops import busy_loops
from benchmarks.train_runs.step_parts import part_shares
from weights.training.trainer import StepReport

# the machine as it is, and with a busy process next to the run
QUIET, BUSY, PROFILED = "quiet", "busy", "profiled"
# steps that allocate memory and start threads
_WARM_UP = "warm-up"
_WARM_UP_STEPS = 3


class AllMeasured(Exception):
    """All steps were measured; it ends the run without a checkpoint."""


class MeasuredSteps:
    """Receives the report of each step, and prepares the next step's phase.

    A phase of ``steps`` timed steps begins with an untimed one, in which the processes get used to
    each other.
    """

    def __init__(self, rounds: int, steps: int) -> None:
        """Plan ``rounds`` phases of each kind, in turn, and one profiled phase."""
        kinds = [kind for _ in range(rounds) for kind in (QUIET, BUSY)] + [PROFILED]
        self._phases = [(_WARM_UP, True)] * _WARM_UP_STEPS
        for kind in kinds:
            self._phases += [(kind, False), *[(kind, True)] * steps]
        self._done = 0
        self._kind = _WARM_UP
        self._speeds: dict[str, list[float]] = {}
        self._seconds = 0.0
        self._profile: profile | None = None
        self._open = contextlib.ExitStack()

    @property
    def count(self) -> int:
        """Steps of all phases."""
        return len(self._phases)

    @property
    def tokens_per_s(self) -> Mapping[str, float]:
        """Median speed of the timed steps, by kind of phase."""
        return {kind: median(speeds) for kind, speeds in self._speeds.items()}

    def shares(self) -> Mapping[str, float]:
        """Share of each part of a step, from the profiled steps."""
        assert self._profile is not None
        events = self._profile.events()  # type: ignore[no-untyped-call]
        return part_shares(events, self._seconds)

    def on_step(self, report: StepReport, num_tokens: int) -> bool:
        """Record a step of ``num_tokens`` tokens; AllMeasured after the last one."""
        kind, is_timed = self._phases[self._done]
        self._done += 1
        if kind == PROFILED and is_timed:
            self._seconds += num_tokens / report.tokens_per_s
        elif is_timed:
            self._speeds.setdefault(kind, []).append(report.tokens_per_s)
        if self._done == len(self._phases):
            self.close()
            raise AllMeasured
        self._prepare(*self._phases[self._done])
        return True

    def close(self) -> None:
        """End the busy process or the profile of the current phase."""
        self._open.close()

    def _prepare(self, kind: str, is_timed: bool) -> None:
        if kind != self._kind:
            self.close()
            self._kind = kind
            if kind == BUSY:
                self._open.enter_context(busy_loops(1))
        if kind == PROFILED and is_timed and self._profile is None:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._open.enter_context(self._profile)
