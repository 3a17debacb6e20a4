"""Reads one column of a parquet file, row by row; needs pyarrow, which is optional."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from weights.errors import DataError

_ROWS = 1024  # read at once
_MOST_NAMES = 10


def parquet_values(file: Path, column: str) -> Iterator[tuple[str, object]]:
    """The location and the value of each row of a column.

    Raises:
        DataError: pyarrow is not installed, the file cannot be read or has no rows, or it has no
            such column.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"{file}: a parquet file needs pyarrow; run `pip install pyarrow`"
        ) from None
    number = 0
    try:
        with ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise DataError(f"{file}: {missing_key(column, names)}")
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    yield f"{file}, row {number}", value.as_py()
    except ArrowException as error:
        raise DataError(f"{file}: not a parquet file ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from None
    if not number:
        raise DataError(f"{file}: is empty")


def missing_key(wanted: str, names: Sequence[str]) -> str:
    """The text of an error: which keys there are, and the setting that chooses one."""
    shown = ", ".join(names[:_MOST_NAMES]) or "none"
    return f"has no `{wanted}`; its keys are {shown} (`memplus train` takes data.text_key)"
