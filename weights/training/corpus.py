"""Documents of text and JSONL files, one after another, never all in memory."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weights.errors import DataError

_SUFFIXES = (".txt", ".jsonl")


def corpus_files(paths: Sequence[str]) -> list[Path]:
    """The text files that these files and folders stand for, those of a folder by name.

    Raises:
        DataError: a path is not there, or there is no text file under it.
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
            raise DataError(f"{path}: neither {' nor '.join(_SUFFIXES)}")
        else:
            files.append(path)
    return files


def documents(files: Sequence[Path]) -> Iterator[str]:
    """A ``.txt`` file's text, and the ``text`` of each line of a ``.jsonl`` file.

    Raises:
        DataError: a file is empty or not UTF-8, or a line is no JSON object with a text.
    """
    for file in files:
        if file.suffix == ".txt":
            yield _whole(file)
        else:
            yield from _lines(file)


def _whole(file: Path) -> str:
    try:
        return _checked(file.read_text(encoding="utf-8"), f"{file}")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def json_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object of each line of a ``.jsonl`` file, and where it stands; blank lines are none.

    Raises:
        DataError: the file is empty, cannot be read, or a line is no JSON object.
    """
    is_empty = True
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
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
        raise DataError(f"{where}: expected an object")
    return record


def _lines(file: Path) -> Iterator[str]:
    for where, record in json_objects(file):
        if not isinstance(record.get("text"), str):
            raise DataError(f"{where}: expected an object with a text")
        yield _checked(record["text"], where)


def _checked(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: is empty")
    return text
