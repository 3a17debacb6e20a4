"""The log of a run: one JSON object per line, truncated when a run resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

    def truncate(self, step: int) -> None:
        """Remove records of later steps, and an incomplete last line of a killed run."""
        lines = self._lines()
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.rename(self._path)

    def records(self) -> list[dict[str, Any]]:
        """All records."""
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        return self._path.read_text(encoding="utf-8").splitlines(True)
