"""Tells a slow engine step from one that hangs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# a piece of work may take so many times what it took at the best speed so far: others may keep the
# machine busy, and not every operation is as fast as the average
_PATIENCE = 16


class Progress:
    """When the engine last made progress; another thread asks, to tell the outside.

    There are three signs of it. The engine's thread marks each piece of its work: a layer, the
    logits, the choice of tokens. Native kernels count while they run, so a long call is seen to
    make progress. A step whose pieces nobody sees inside says how much work it is, and its pieces
    get the time that so much work takes by the speed measured so far.
    """

    def __init__(self) -> None:
        # the engine's thread writes these
        self._last: float | None = None
        self._speed = 0.0  # work a second, of the fastest step
        self._allowed_s = 0.0
        # the thread that asks writes these
        self._work_done: Callable[[], int] = lambda: 0
        self._seen = 0
        self._seen_at = 0.0

    @property
    def stalled_s(self) -> float:
        """Seconds without progress beyond those that the work may take, 0 if there is no work."""
        done = self._work_done()
        if done != self._seen:
            self._seen, self._seen_at = done, time.monotonic()
        last = self._last
        if last is None:
            return 0.0
        return max(0.0, time.monotonic() - max(last, self._seen_at) - self._allowed_s)

    def watch(self, work_done: Callable[[], int]) -> None:
        """Take any change of this number for progress as well."""
        self._work_done = work_done

    def mark(self) -> None:
        """Say that something was done, or begins."""
        self._last = time.monotonic()

    def skip(self) -> None:
        """Leave out the time until now, in which the process itself was stopped."""
        self._seen_at = time.monotonic()

    def rest(self) -> None:
        """Say that there is nothing to do."""
        self._last = None

    @contextmanager
    def working(self, work: float, largest: float) -> Iterator[None]:
        """Around a step of so much work, the largest piece between two marks apart.

        Both are in the same unit. The first step gets no extra time: no speed is known yet.
        """
        self._allowed_s = _PATIENCE * largest / self._speed if self._speed else 0.0
        begun = time.monotonic()
        try:
            yield
        finally:
            self._allowed_s = 0.0
        # a clock may be coarser than a tiny step
        self._speed = max(self._speed, work / max(time.monotonic() - begun, 1e-6))
