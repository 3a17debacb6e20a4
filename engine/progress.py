"""Distinguishes a slow engine step from one that hangs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# allowed time of a piece of work, relative to its time at the best speed so far
_PATIENCE = 16


class Progress:
    """Records when the engine last made progress; another thread reads and reports it.

    The engine's thread marks each piece of its work: a layer, the logits, the choice of tokens.
    Native kernels increment counters while they run. A step without such counters announces its
    amount of work, and gets the time that this work takes at the speed measured so far.
    """

    def __init__(self) -> None:
        # written by the engine's thread
        self._last: float | None = None
        self._speed = 0.0  # work per second of the fastest step
        self._allowed_s = 0.0
        # written by the thread that reports
        self._work_done: Callable[[], int] = lambda: 0
        self._seen = 0
        self._seen_at = 0.0

    @property
    def stalled_s(self) -> float:
        """Seconds without progress beyond the time allowed for the work; 0 if there is none."""
        done = self._work_done()
        if done != self._seen:
            self._seen, self._seen_at = done, time.monotonic()
        last = self._last
        if last is None:
            return 0.0
        return max(0.0, time.monotonic() - max(last, self._seen_at) - self._allowed_s)

    def watch(self, work_done: Callable[[], int]) -> None:
        """Count every change of this number as progress too."""
        self._work_done = work_done

    def mark(self) -> None:
        """Record that a piece of work begins or ended."""
        self._last = time.monotonic()

    def skip(self) -> None:
        """Ignore the time until now, in which the process itself was stopped."""
        self._seen_at = time.monotonic()

    def rest(self) -> None:
        """Record that there is no work."""
        self._last = None

    @contextmanager
    def working(self, work: float, largest: float) -> Iterator[None]:
        """Wrap a step of this much work; ``largest`` is its largest piece between two marks.

        Both have the same unit. The first step gets no extra time: no speed is known yet.
        """
        self._allowed_s = _PATIENCE * largest / self._speed if self._speed else 0.0
        begun = time.monotonic()
        try:
            yield
        finally:
            self._allowed_s = 0.0
        # the clock may be too coarse for a tiny step
        self._speed = max(self._speed, work / max(time.monotonic() - begun, 1e-6))
