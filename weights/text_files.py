"""Reads text files that people write: UTF-8, with or without a byte order mark, any line ends."""

import json
from pathlib import Path
from typing import Any

from weights.errors import CheckpointError

# UTF-8 that may begin with a byte order mark, as editors on Windows write it
ENCODING, MARK = "utf-8-sig", "\ufeff"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint folder.

    Raises:
        CheckpointError: the file cannot be read, or is not a JSON object in UTF-8.
    """
    try:
        raw = json.loads(path.read_text(encoding=ENCODING))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return raw
