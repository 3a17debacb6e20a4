"""Creates folders and replaces files atomically, and tests early whether a folder can be made."""

import contextlib
import errno
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
    partial = partial_path(folder)
    # Before the try: if the name is taken, that folder is not ours to remove.
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_new_folder(folder: Path) -> None:
    """Create the parent of a folder, and test that the folder could be created (OSError)."""
    partial = partial_path(folder)
    partial.mkdir(parents=True)
    partial.rmdir()


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError if the folder's disk has not as many bytes free."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        needs = f"{num_bytes:,} bytes are needed, but {free:,} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needs}")


def partial_path(target: Path) -> Path:
    """A temporary name next to a file or folder, to write it under before it is renamed."""
    # random: a process in another container may have the same pid and parent folder
    return target.with_name(f".{target.name}.partial-{secrets.token_hex(8)}")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has the old content or the new (OSError)."""
    partial = partial_path(path)
    try:
        write_synced(partial, content)
        partial.rename(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and fsync its content, but not its folder (OSError)."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that the names in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
