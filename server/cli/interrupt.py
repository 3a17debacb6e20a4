"""Ctrl+C while a verb runs: the first raises KeyboardInterrupt, a second ends the process."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """Whether Ctrl+C has arrived.

    Libraries turn KeyboardInterrupt into other errors, for example while they are imported.
    """

    def __init__(self) -> None:
        self.has_arrived = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT; leave a second one to the system, which prints no traceback."""
        self.has_arrived = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Handle SIGINT while the block runs, unless it is ignored or this is not the main thread."""
    interrupt = Interrupt()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
