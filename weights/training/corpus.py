"""Streams documents from text, JSONL and parquet files, compressed by gzip or not."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from weights.errors import DataError
from weights.text_files import ENCODING, MARK
from weights.training.parquet_texts import missing_key, parquet_values

TEXT_KEY = "text"
_PARQUET, _GZIP = ".parquet", ".gz"
_ESCAPE = "surrogateescape"
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", _PARQUET)
# a longer document would take several GB of tokens before they are written
_MAX_CHARACTERS = 2**28


def corpus_files(paths: Sequence[str]) -> list[Path]:
    """The text files among these files and folders; files of a folder are sorted by path.

    Raises:
        DataError: a path does not exist, is not a text file, or is a folder without text files.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            found = [one for one in _files_below(path) if _is_text(one)]
            if not found:
                raise DataError(f"{path}: has no file of a known kind: {', '.join(SUFFIXES)}")
            files += found
        elif not path.is_file():
            place = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise DataError(f"{path}: no such file or folder{place}")
        elif not _is_text(path):
            raise DataError(f"{path}: is of no known kind: {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def other_files(paths: Sequence[str]) -> list[Path]:
    """Files in these folders that ``corpus_files`` leaves out."""
    folders = [path for path in (Path(name).expanduser() for name in paths) if path.is_dir()]
    return [one for folder in folders for one in _files_below(folder) if not _is_text(one)]


def _files_below(folder: Path) -> list[Path]:
    # no pipes, which might never end; a link to nothing stays, so that reading it is an error
    return sorted(one for one in folder.rglob("*") if one.is_file() or not one.exists())


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def documents(files: Sequence[Path], text_key: str = TEXT_KEY) -> Iterator[str]:
    """The text of each ``.txt`` file, and ``text_key`` of each JSONL line or parquet row.

    Raises:
        DataError: a file is empty, cannot be read or is not UTF-8, or a line or row has no string
            ``text_key``.
    """
    for file in files:
        name = file.name.lower().removesuffix(_GZIP)
        if name.endswith(_PARQUET):
            yield from _rows(file, text_key)
        elif name.endswith(".jsonl"):
            yield from _lines(file, text_key)
        else:
            yield _whole(file)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """The file as text; DataError with its name if it cannot be read.

    Bytes that are not UTF-8 become lone surrogates, because an error of the decoder would name the
    place in the part of the file that it reads at once.
    """
    try:
        if file.name.lower().endswith(_GZIP):
            with gzip.open(file, "rt", encoding=ENCODING, errors=_ESCAPE) as text:
                yield text
        else:
            with open(file, encoding=ENCODING, errors=_ESCAPE) as text:
                yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def _whole(file: Path) -> str:
    with _opened(file) as text:
        # a character has at most 4 bytes
        raw = text.buffer.read(4 * _MAX_CHARACTERS + 1)
        _check_length(raw[::4], f"{file}")
        whole = raw.decode(ENCODING)  # at once, so that an error names the byte in the file
    _check_length(whole, f"{file}")
    whole = whole.replace("\r\n", "\n").replace("\r", "\n")
    return checked_text(whole, f"{file}")


def _check_length(text: str | bytes, where: str) -> None:
    if len(text) > _MAX_CHARACTERS:
        raise DataError(f"{where}: has more than {_MAX_CHARACTERS:,} characters; split it")


def _check_utf8(line: str, where: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: not UTF-8") from None


def json_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The location and the object of each line of a JSONL file; skips blank lines.

    Raises:
        DataError: the file is empty or cannot be read, or a line is not a JSON object.
    """
    number, is_empty = 0, True
    with _opened(file) as lines:
        while line := lines.readline(_MAX_CHARACTERS + 1):
            number += 1
            where = f"{file}, line {number}"
            _check_length(line, where)
            _check_utf8(line, where)
            line = line.removeprefix(MARK)  # files that were joined have several marks
            if line.strip():
                is_empty = False
                yield where, _object(line, where)
    if is_empty:
        raise DataError(f"{file}: is empty")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object")
    return record


def _lines(file: Path, text_key: str) -> Iterator[str]:
    for where, record in json_objects(file):
        if text_key not in record:
            raise DataError(f"{where}: {missing_key(text_key, list(record))}")
        yield _checked_value(record[text_key], where, text_key)


def _rows(file: Path, text_key: str) -> Iterator[str]:
    for where, value in parquet_values(file, text_key):
        yield _checked_value(value, where, text_key)


def _checked_value(value: object, where: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {text_key}: expected a string")
    _check_length(value, where)
    return checked_text(value, where)


def checked_text(text: str, where: str) -> str:
    """The text; DataError naming ``where`` if it is blank or cannot be written as UTF-8."""
    if not text.strip():
        raise DataError(f"{where}: is empty")
    return encodable_text(text, where)


def encodable_text(text: str, where: str) -> str:
    """The text; DataError naming ``where`` if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write it, UTF-8 cannot
        raise DataError(f"{where}: has a lone surrogate") from None
    return text
