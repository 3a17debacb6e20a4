"""Starts child processes that signals to the process group, such as Ctrl+C, do not reach."""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start_shielded(process: BaseProcess) -> None:
    """Start a process in which SIGINT and SIGTERM stay blocked; its parent must end it."""
    # its start unblocks the signals of the calling thread, so it must run already
    resource_tracker.ensure_running()
    with shielded():
        process.start()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """SIGINT and SIGTERM stay blocked in processes that this thread starts inside the block.

    A handler that the child sets in its first line would be too late: the interpreter and the main
    module take a second to load, and Ctrl+C in that time would print a traceback.
    """
    # the child keeps this thread's mask; a signal that arrives now is delivered afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
