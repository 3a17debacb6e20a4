"""The folder of a training run: its checkpoints, its lock, and leftovers. Needs no torch."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from weights.errors import TrainingError

logger = logging.getLogger(__name__)
CHECKPOINTS, DATA, LOG, SETTINGS = "checkpoints", "data", "log.jsonl", "settings.json"
_STATE = re.compile(r"step-\d{8}")


def saved_states(folder: Path) -> list[Path]:
    """Complete states in a folder of checkpoints, oldest first: by step, not by time."""
    return sorted(one for one in folder.glob("step-*") if _STATE.fullmatch(one.name))


def newest_state(run: Path) -> Path | None:
    """The newest checkpoint of a run's folder; None if it is not such a folder, or has none."""
    return max(saved_states(run / CHECKPOINTS), default=None)


def step_of(state: Path) -> int:
    """The steps done at one of the ``saved_states``, by its name."""
    return int(state.name.removeprefix("step-"))


def has_run(folder: Path) -> bool:
    """Whether a run began in a folder, with or without a checkpoint."""
    return newest_state(folder) is not None or (folder / SETTINGS).exists()


def check_resume(folder: Path, *, resume: bool) -> None:
    """Check that ``resume`` fits the folder.

    Raises:
        TrainingError: the folder has a checkpoint, and ``resume`` is not set; or it has no run to
            resume.
    """
    if newest_state(folder) is not None and not resume:
        raise TrainingError(f"{folder}: already has a run; add --resume to continue it")
    if resume and not has_run(folder):
        raise TrainingError(f"{folder}: has no run to resume; leave out --resume to start one")


def remove_leftovers(folder: Path) -> None:
    """Remove files and folders that a killed process had not finished to write or to remove."""
    for place in (folder, folder / DATA, folder / CHECKPOINTS):
        for left in place.glob(".*.partial-*"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder.

    Creates the folder, and removes it if it is empty at the end. The lock ends with the process,
    however it ends. On a file system without locks there is only a warning.

    Raises:
        TrainingError: another process trains in the folder, or it cannot be created.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise TrainingError(f"{folder}: {error.strerror}") from None
    try:
        _lock(descriptor, folder)
        try:
            yield
        finally:
            # before the lock ends, so that no other process has taken the folder
            with contextlib.suppress(OSError):  # it is not empty
                for one in missing:
                    one.rmdir()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TrainingError(f"{folder}: another process trains in this folder") from None
    except OSError as error:
        logger.warning(
            "%s: cannot be locked (%s); let no other process train in it", folder, error.strerror
        )
    try:
        is_there = os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise TrainingError(f"{folder}: another process has removed it; repeat the command")
