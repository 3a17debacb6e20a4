"""The files of a GGUF model, which may be split. Needs no torch."""

import hashlib
import re
from pathlib import Path

from weights.errors import CheckpointError
from weights.text_files import regular_file_bytes

_PART = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.gguf)", re.IGNORECASE)
_BEGINNING = 2**20


def is_gguf(file: Path) -> bool:
    """Whether a file's name is that of a GGUF file."""
    return file.suffix.lower() == ".gguf"


def gguf_files(file: Path) -> list[Path]:
    """A model's files in order; ``file`` is the only one, or the first one of a split model.

    Raises:
        CheckpointError: it is another part of a split model, or a part is missing.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    start, number, middle, count, end = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if not count:
        raise CheckpointError(f"{file}: a model cannot have 0 parts")
    if number != 1:
        raise CheckpointError(f"{file}: is part {number} of {count}; give the first part")
    parts = [
        file.parent / f"{start}{part:05}{middle}{count:05}{end}" for part in range(1, count + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part}: is missing; {file.name} is the first of {count} parts")
    return parts


def files_version(file: Path) -> str:
    """A hash that changes with the sizes, times and beginnings of a model's files.

    Raises:
        CheckpointError: as ``gguf_files``, or a file cannot be read.
    """
    found = hashlib.sha256()
    for part in gguf_files(file):
        regular_file_bytes(part)
        try:
            status = part.stat()
            found.update(f" {status.st_size} {status.st_mtime_ns}".encode())
            with open(part, "rb") as content:
                found.update(content.read(_BEGINNING))
        except OSError as error:
            raise CheckpointError(f"{part}: cannot be read ({error.strerror})") from None
    return found.hexdigest()[:16]
