"""Collects SIGINT and SIGTERM, so that a run ends after its current step."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signals(*, once: bool) -> Iterator[list[int]]:
    """The numbers of signals that arrived; at the end their handlers are restored.

    With ``once``, a second signal of the same number has its usual effect.
    """
    stopped_by: list[int] = []
    ending: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in ending}

    def stop(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)
        if once:
            signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, stop)
    try:
        yield stopped_by
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
