"""Kills a process when its parent ends."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def end_with(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends.

    Even a process that hangs or is stopped ends then. The parent must start this process in a
    thread that lives as long as itself, such as its main thread.

    Args:
        parent: the process id of the parent; if it has ended already, this process exits.

    Raises:
        OSError: the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before
        os._exit(0)
