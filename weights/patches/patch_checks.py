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
# by bytes of a value: its bits as unsigned and signed integers, the sign bit, bits of infinity
_BITS = {2: ("u2", "i2", 0x8000, 0x7F80), 4: ("u4", "i4", 0x80000000, 0x7F800000)}


def check_headers(
    file: Path, stored: Mapping[str, StoredTensor], description: PatchDescription
) -> None:
    """Check names, dtypes and shapes of a patch's tensors, before any of them is read.

    Raises:
        PatchError: they do not match the description.
    """
    known = {f"{name}{kind}" for name in description.shapes for kind in (ROWS, DELTAS)}
    for name in sorted(known.symmetric_difference(stored)):
        problem = "is missing" if name in known else "is unknown: patch.json has no such table"
        raise PatchError(f"{file}: tensor {name[:120]} {problem}")
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


def check_row_ids(where: str, rows_P: Tensor, num_rows: int) -> None:
    """Raise PatchError unless the ids ascend, are unique, and lie in ``[0, num_rows)``."""
    # in numpy: the threads of a large torch operation would delay a server's running requests
    ids_P = rows_P.numpy()
    is_wrong = ids_P[1:] <= ids_P[:-1]
    if is_wrong.any():
        at = int(is_wrong.argmax())
        before, after = int(ids_P[at]), int(ids_P[at + 1])
        if before == after:
            raise PatchError(f"{where}: row {before} is given twice")
        raise PatchError(f"{where}: row ids must ascend, but {after} follows {before}")
    if len(ids_P) and not (ids_P[0] >= 0 and ids_P[-1] < num_rows):
        row = int(ids_P[0] if ids_P[0] < 0 else ids_P[-1])
        raise PatchError(f"{where}: row {row} is outside the table of {num_rows} rows")


def first_not_finite(part: memoryview, itemsize: int) -> int | None:
    """Index of the first NaN or infinity among bf16 or fp32 values; None if all are finite."""
    unsigned, signed, sign, infinity = _BITS[itemsize]
    bits = np.frombuffer(part, dtype=unsigned)
    # the largest bits are of the largest negative value, or as signed integers of a positive one
    if not len(bits) or (bits.max() < sign | infinity and bits.view(signed).max() < infinity):
        return None
    return int(((bits & bits.dtype.type(sign - 1)) >= infinity).argmax())
