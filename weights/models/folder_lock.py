"""Locks that keep converted folders while a process uses them. Needs no torch."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from weights.checkpoints.new_folder import partial_path


def hold(folder: Path) -> int | None:
    """Keep a folder from ``remove_unheld`` until this process ends; None if it does not exist.

    Returns the descriptor that holds the lock. Nothing closes it but the end of the process.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    # on a file system without locks, remove_unheld fails too
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError):
        # another process may have removed the folder before the lock was taken
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    os.close(descriptor)
    return None


def remove_unheld(folder: Path) -> None:
    """Remove a folder, unless a process holds it.

    Raises:
        OSError: the folder cannot be removed.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        # renamed first, so that a folder is found whole or not at all
        shutil.rmtree(folder.rename(partial_path(folder)))
    finally:
        os.close(descriptor)
