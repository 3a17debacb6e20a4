"""Record of the texts and settings from which a run's data folder is made."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weights.checkpoints.tokenizer import TOKENIZER_FILES
from weights.errors import DataError
from weights.training.corpus import corpus_files
from weights.training.train_config import DataConfig

RECORD_FILE = "source.json"


def discard_stale_data(folder: Path, config: DataConfig, seed: int, init_from: str) -> None:
    """Remove tokenizer and tokens in ``folder`` unless the same texts and settings made them.

    Texts are known by path, size and time of change. Call it before a run has trained: later, its
    data must stay as they are.

    Raises:
        DataError: a text does not exist, or the folder cannot be written.
    """
    record = folder / RECORD_FILE
    settings = [config.vocab_size, config.validation_share, config.tokenizer, seed, init_from]
    try:
        now = json.loads(json.dumps({"settings": settings, "files": [*_files(config, init_from)]}))
        if _read(record) == now:
            return
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        for name in ("train", "validation"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        (folder / "tokenizer.model").unlink(missing_ok=True)
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        partial.rename(record)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}") from None


def _files(config: DataConfig, init_from: str) -> Iterator[tuple[str, str, int, int]]:
    """Use, path, size in bytes and time of change in nanoseconds of each file."""
    given = Path(config.tokenizer or init_from)
    own = (
        [given / name for name in (*TOKENIZER_FILES, "config.json")] if given.is_dir() else [given]
    )
    sources = {
        "train": corpus_files(config.train),
        "validation": corpus_files(config.validation),
        "tokenizer": [file for file in own if file.is_file()],
    }
    for use, files in sources.items():
        for file in files:
            status = file.stat()
            yield use, str(file.absolute()), status.st_size, status.st_mtime_ns


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # there is no whole record
