"""Results of a long benchmark, so that it can resume: its settings, and a CSV line per run."""

import csv
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = TypeVar("Result", bound="DataclassInstance")


def keep_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that all results of a folder share, if the file does not exist.

    Raises:
        ConfigError: the file has others; the message names their keys.
    """
    text = json.dumps(settings, indent=1) + "\n"
    if not file.exists():
        file.write_text(text)
        return
    kept, wanted = json.loads(file.read_text()), json.loads(text)
    if differing := sorted(key for key in {*kept, *wanted} if kept.get(key) != wanted.get(key)):
        raise ConfigError(
            f"out: {file.parent} has results of other settings: {', '.join(differing)}; see {file}"
        )


def read_results(file: Path, kind: type[Result]) -> list[Result]:
    """Read all results, dataclasses of numbers and strings; none if the file does not exist."""
    if not file.exists():
        return []
    kinds = {field.name: field.type for field in fields(kind)}
    with open(file, newline="", encoding="utf-8") as lines:
        rows: Sequence[dict[str, str]] = list(csv.DictReader(lines))
    return [kind(**{name: kinds[name](row[name]) for name in kinds}) for row in rows]  # type: ignore[operator]


def append_result(file: Path, result: "DataclassInstance") -> None:
    """Append a line; safe with several processes."""
    names: Sequence[str] = [field.name for field in fields(result)]
    with open(file, "a+", newline="", encoding="utf-8") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.seek(0)
        # a file of an earlier version may have its columns in another order
        header = next(csv.reader(lines), [])
        lines.seek(0, os.SEEK_END)
        writer = csv.DictWriter(lines, header or names, lineterminator="\n")
        if not header:
            writer.writeheader()
        writer.writerow(asdict(result))
