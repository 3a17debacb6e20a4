"""Starts child processes that signals to the process group, such as Ctrl+C, do not reach."""

import signal
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start_shielded(process: BaseProcess) -> None:
    """Start a process in which SIGINT and SIGTERM stay blocked; its parent must end it.

    A handler that the child sets in its first line would be too late: the interpreter and the main
    module take a second to load, and Ctrl+C in that time would print a traceback.
    """
    # its start unblocks the signals of the calling thread, so it must run already
    resource_tracker.ensure_running()
    # the child keeps this thread's mask; a signal that arrives now is delivered afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
