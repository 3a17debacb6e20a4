"""Folders that are there whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled under another name; it gets its own when all went well, else it goes.

    Raises:
        OSError: it cannot be made.
    """
    # The name is random: a process in another container may have the same pid and parent folder.
    partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(8)}")
    # This fails if the name is taken. It stands before the try, since that folder is not ours.
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file that outlives a loss of power, its name apart (OSError)."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in it outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
