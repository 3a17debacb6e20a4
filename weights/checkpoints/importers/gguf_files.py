"""The files of a GGUF model, which may be split. Needs no torch."""

import re
from pathlib import Path

from weights.errors import CheckpointError

_PART = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf")


def gguf_files(file: Path) -> list[Path]:
    """A model's files in order; ``file`` is the only one, or the first one of a split model.

    Raises:
        CheckpointError: it is another part of a split model, or a part is missing.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    start, number, count = match[1], int(match[2]), int(match[3])
    if not count:
        raise CheckpointError(f"{file}: a model cannot have 0 parts")
    if number != 1:
        raise CheckpointError(f"{file}: is part {number} of {count}; give the first part")
    parts = [file.parent / f"{start}{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part}: is missing; {file.name} is the first of {count} parts")
    return parts
