"""The log of a run: one JSON object per line, truncated when a run resumes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights.checkpoints.new_folder import replace_file
from weights.errors import TrainingError


class RunLog:
    """An append-only file of records, each with its ``step``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            TrainingError: the file cannot be written; the message names the step.
        """
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            step, name = record["step"], self._path.name
            raise TrainingError(f"step {step}: {name}: {error.strerror}") from None

    def sync(self) -> None:
        """Write the records to disk, so that they survive a power loss.

        Raises:
            TrainingError: the file cannot be written.
        """
        try:
            with open(self._path, "ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(f"{self._path}: {error.strerror}") from None

    def truncate(self, step: int) -> None:
        """Remove records of later steps, and incomplete lines of a run that was killed.

        Raises:
            TrainingError: the file cannot be read or written.
        """
        try:
            content = self._path.read_bytes() if self._path.exists() else b""
            lines = content.splitlines(True)
            kept = [line for line in lines if (done := _step(line)) is not None and done <= step]
            if kept != lines:
                replace_file(self._path, b"".join(kept))
        except OSError as error:
            raise TrainingError(f"{self._path}: {error.strerror}") from None

    def records(self) -> list[dict[str, Any]]:
        """All records."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]


def _step(line: bytes) -> int | None:
    """The step of a record; None if the line is not whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError):
        return None
