"""Record of the texts and settings from which a run's data folder is made."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weights.checkpoints.new_folder import replace_file
from weights.checkpoints.tokenizer import TOKENIZER_FILES
from weights.errors import DataError
from weights.training.train_config import DataConfig
from weights.training.training_texts import TrainingTexts

RECORD_FILE = "source.json"
# change it with the way in which documents are divided and tokenised
_VERSION = 2


def is_current_data(
    folder: Path, config: DataConfig, seed: int, init_from: str, texts: TrainingTexts
) -> bool:
    """Whether tokenizer and tokens in ``folder`` are from the same texts and settings.

    Texts are known by their content.

    Raises:
        DataError: a text cannot be read.
    """
    before = _read(folder / RECORD_FILE)
    try:
        return before is not None and _identity(before) == _identity(
            _source(config, seed, init_from, texts)
        )
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None


def discard_stale_data(
    folder: Path, config: DataConfig, seed: int, init_from: str, texts: TrainingTexts
) -> None:
    """Remove tokenizer and tokens in ``folder`` unless the same texts and settings made them.

    Call it before a run has trained: later, its data must stay
    as they are.

    Raises:
        DataError: a text cannot be read, or the folder cannot be written.
    """
    record = folder / RECORD_FILE
    try:
        now, before = _source(config, seed, init_from, texts), _read(record)
        if before is not None and _identity(before) == _identity(now):
            return
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        for name in ("train", "validation"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        (folder / "tokenizer.model").unlink(missing_ok=True)
        replace_file(record, f"{json.dumps(now, indent=1)}\n".encode())
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}") from None


def has_same_sources(folder: Path, config: DataConfig, init_from: str) -> bool:
    """Whether files with the same content as those of the record are at the paths of ``config``.

    Raises:
        DataError: a path does not exist, or a text cannot be read.
    """
    before = _read(folder / RECORD_FILE)
    if before is None:
        return False
    files = _files(config, init_from, TrainingTexts(config, seed=0))
    try:
        return [(one["use"], one["sha256"]) for one in files] == _identity(before)[1]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None


def changed_texts(folder: Path) -> list[str]:
    """Paths of the texts that have changed or are missing since the tokens were made.

    A file of the same size and time counts as the same, so that large texts are not read again.
    """
    before = _read(folder / RECORD_FILE)
    return [] if before is None else [one["path"] for one in before["files"] if _has_changed(one)]


def _source(config: DataConfig, seed: int, init_from: str, texts: TrainingTexts) -> dict[str, Any]:
    """The record of these texts and settings."""
    settings = [
        *(_VERSION, config.vocab_size, config.validation_share, config.text_key),
        *(bool(config.tokenizer or init_from), seed),
    ]
    return {"settings": settings, "files": list(_files(config, init_from, texts))}


def _has_changed(recorded: dict[str, Any]) -> bool:
    path = Path(recorded["path"])
    try:
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (recorded["bytes"], recorded["modified_ns"]):
            return False
        return bool(status.st_size != recorded["bytes"] or _hash(path) != recorded["sha256"])
    except OSError:
        return True


def _files(config: DataConfig, init_from: str, texts: TrainingTexts) -> Iterator[dict[str, Any]]:
    """Use, path, size in bytes, time of change in nanoseconds and hash of each file."""
    given = Path(config.tokenizer or init_from)
    own = (
        [given / name for name in (*TOKENIZER_FILES, "config.json")] if given.is_dir() else [given]
    )
    sources = {
        "train": texts.train_files,
        "validation": texts.validation_files,
        "tokenizer": [file for file in own if file.is_file()],
    }
    for use, files in sources.items():
        for file in files:
            status = file.stat()
            yield {
                "use": use,
                "path": str(file.absolute()),
                "bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "sha256": _hash(file),
            }


def _hash(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _identity(record: dict[str, Any]) -> tuple[list[Any], list[tuple[str, str]]]:
    """The part of a record that must be the same: not the places and times of the files."""
    return record["settings"], [(one["use"], one["sha256"]) for one in record["files"]]


def _read(record: Path) -> dict[str, Any] | None:
    """A whole record of this version; None if there is none."""
    try:
        raw = json.loads(record.read_text(encoding="utf-8"))
        return raw if raw["settings"][0] == _VERSION else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
