"""Reads text files that people write: UTF-8, with or without a byte order mark, any line ends."""

import json
import stat
from pathlib import Path
from typing import Any

from weights.errors import CheckpointError

# UTF-8 that may begin with a byte order mark, as editors on Windows write it
ENCODING, MARK = "utf-8-sig", "\ufeff"
_MAX_JSON_BYTES = 2**24


def regular_file_bytes(path: Path, most: int | None = None) -> int:
    """The size of a file, checked before the file is opened.

    Raises:
        CheckpointError: it does not exist, has more than ``most`` bytes, or is not a regular file.
            Others, such as a FIFO, may make a reader wait or never end.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    if most is not None and status.st_size > most:
        raise CheckpointError(f"{path}: has {status.st_size} bytes, more than {most}")
    return status.st_size


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError if it gives a key twice, because readers then differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!a} is given twice")
            seen.add(key)
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint folder.

    Raises:
        CheckpointError: the file cannot be read, is not a JSON object in UTF-8, gives a key twice,
            or has more than 16 MiB.
    """
    regular_file_bytes(path, _MAX_JSON_BYTES)
    try:
        raw = json.loads(path.read_text(encoding=ENCODING), object_pairs_hook=unique_keys)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return raw
