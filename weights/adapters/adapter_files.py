"""The files of memory adapters. Needs no torch."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from weights.errors import CheckpointError

DESCRIPTION = "memory_adapter.json"


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, without folders and broken links.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted(file for file in folder.iterdir() if file.is_file())


def files_version(folders: Iterable[Path]) -> str:
    """A hash that changes with the names, sizes and times of the files in folders.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    found = hashlib.sha256()
    for folder in folders:
        try:
            for file in files_of(folder):
                status = file.stat()
                found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    return found.hexdigest()[:16]
