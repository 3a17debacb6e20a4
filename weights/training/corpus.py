"""Streams documents from text and JSONL files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weights.errors import DataError
from weights.text_files import ENCODING, MARK

_SUFFIXES = (".txt", ".jsonl")


def corpus_files(paths: Sequence[str]) -> list[Path]:
    """The text files among these files and folders; files of a folder are sorted by path.

    Raises:
        DataError: a path does not exist, is not a text file, or is a folder without text files.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.suffix in _SUFFIXES)
            if not found:
                raise DataError(f"{path}: has no {' or '.join(_SUFFIXES)} file")
            files += found
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        elif path.suffix not in _SUFFIXES:
            raise DataError(f"{path}: is neither a {' nor a '.join(_SUFFIXES)} file")
        else:
            files.append(path)
    return files


def documents(files: Sequence[Path]) -> Iterator[str]:
    """The text of each ``.txt`` file, and the ``text`` of each line of a ``.jsonl`` file.

    Raises:
        DataError: a file is empty or not UTF-8, or a line is not a JSON object with a string
            ``text``.
    """
    for file in files:
        if file.suffix == ".txt":
            yield _whole(file)
        else:
            yield from _lines(file)


def _whole(file: Path) -> str:
    try:
        return checked_text(file.read_text(encoding=ENCODING), f"{file}")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def json_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The location and the object of each line of a ``.jsonl`` file; skips blank lines.

    Raises:
        DataError: the file is empty or cannot be read, or a line is not a JSON object.
    """
    is_empty = True
    try:
        with open(file, encoding=ENCODING) as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(MARK)  # files that were joined have several marks
                if not line.strip():
                    continue
                is_empty = False
                yield f"{file}, line {number}", _object(line, f"{file}, line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
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


def _lines(file: Path) -> Iterator[str]:
    for where, record in json_objects(file):
        if not isinstance(record.get("text"), str):
            raise DataError(f"{where}: expected a JSON object with a string `text`")
        yield checked_text(record["text"], where)


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
