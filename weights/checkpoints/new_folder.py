"""Creates folders atomically."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it is renamed to ``folder`` on success and removed on error.

    Raises:
        OSError: the folder cannot be created.
    """
    # The name is random: a process in another container may have the same pid and parent folder.
    partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(8)}")
    # Before the try: if the name is taken, that folder is not ours to remove.
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
    """Write a new file and fsync its content, but not its folder (OSError)."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Fsync a folder, so that the names in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
