"""Checks of a row patch's tensors: shapes and dtypes before, ids and values after reading."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import PatchError
from weights.patches.description import PatchDescription

ROWS, DELTAS = ".rows", ".deltas"
DELTA_DTYPES = ("BF16", "F32")
# by bytes of a value: its integer type, the bits without the sign, and those of infinity
_MAGNITUDES = {2: ("u2", 0x7FFF, 0x7F80), 4: ("u4", 0x7FFFFFFF, 0x7F800000)}


def check_headers(
    file: Path,
    stored: Mapping[str, StoredTensor],
    description: PatchDescription,
    max_rows: int | None,
) -> None:
    """Check names, dtypes and shapes of a patch's tensors, before any of them is read.

    Raises:
        PatchError: they do not match the description, or the tables have more than ``max_rows``
            rows together.
    """
    known = {f"{name}{kind}" for name in description.shapes for kind in (ROWS, DELTAS)}
    for name in sorted(known.symmetric_difference(stored)):
        problem = "is missing" if name in known else "is unknown: patch.json has no such table"
        raise PatchError(f"{file}: tensor {name[:120]} {problem}")
    total = 0
    for table, (num_rows, value_dim) in description.shapes.items():
        rows, deltas = stored[table + ROWS], stored[table + DELTAS]
        if rows.dtype != "I64" or len(rows.shape) != 1:
            found = f"{rows.dtype} {list(rows.shape)}"
            raise PatchError(f"{file}: tensor {rows.name}: expected I64 [P], got {found}")
        count = rows.shape[0]
        if deltas.dtype not in DELTA_DTYPES or deltas.shape != (count, value_dim):
            expected = f"{' or '.join(DELTA_DTYPES)} {[count, value_dim]}"
            found = f"{deltas.dtype} {list(deltas.shape)}"
            raise PatchError(f"{file}: tensor {deltas.name}: expected {expected}, got {found}")
        if count > num_rows:
            raise PatchError(
                f"{file}: tensor {rows.name}: has {count} row ids for a table of {num_rows} rows"
            )
        total += count
    if max_rows is not None and total > max_rows:
        raise PatchError(f"{file}: has {total} rows, but at most {max_rows} are allowed")


def check_row_ids(where: str, rows_P: Tensor, num_rows: int) -> None:
    """Raise PatchError unless the ids ascend, are unique, and lie in ``[0, num_rows)``."""
    steps = rows_P[1:] - rows_P[:-1]
    if (wrong := (steps <= 0).nonzero()).numel():
        at = int(wrong[0])
        before, after = int(rows_P[at]), int(rows_P[at + 1])
        if before == after:
            raise PatchError(f"{where}: row {before} is given twice")
        raise PatchError(f"{where}: row ids must ascend, but {after} follows {before}")
    if len(rows_P) and not (int(rows_P[0]) >= 0 and int(rows_P[-1]) < num_rows):
        row = int(rows_P[0]) if int(rows_P[0]) < 0 else int(rows_P[-1])
        raise PatchError(f"{where}: row {row} is outside the table of {num_rows} rows")


def first_not_finite(part: memoryview, itemsize: int) -> int | None:
    """Index of the first NaN or infinity among bf16 or fp32 values; None if all are finite."""
    dtype, mask, infinity = _MAGNITUDES[itemsize]
    bits = np.frombuffer(part, dtype=dtype)
    magnitudes = bits & bits.dtype.type(mask)
    if not len(magnitudes) or magnitudes.max() < infinity:
        return None
    return int((magnitudes >= infinity).argmax())
