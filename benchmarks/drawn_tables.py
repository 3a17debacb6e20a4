"""Large random tables of every dtype that a table may have."""

import mmap
from typing import cast

import torch
from torch import Tensor

from memory_ops.anonymous import anonymous_zeros
from memory_ops.operations import quantize_rows
from memory_ops.row_formats import ROW_FORMATS, RowFormat

# rows that a table is made of: what a row holds takes no time
DRAWN_ROWS = 2**12
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES = (*PLAIN, *ROW_FORMATS)


def drawn_rows(dtype: str, width: int) -> Tensor:
    """``DRAWN_ROWS`` of them, ``[R, V]`` or records ``[R, B]``, for ``repeated``."""
    values_PV = torch.randn(DRAWN_ROWS, width)
    if dtype in PLAIN:
        return values_PV.to(PLAIN[dtype])
    return quantize_rows(values_PV, cast(RowFormat, dtype)).records_RB


def repeated(part_PB: Tensor, num_rows: int, huge_pages: bool = True) -> Tensor:
    """A large table whose rows are those of ``part_PB`` again and again, on pages of that kind."""
    shape = (num_rows, part_PB.shape[1])
    if huge_pages:
        whole_RB = anonymous_zeros(shape, part_PB.dtype)
    else:
        num_bytes = num_rows * part_PB.shape[1] * part_PB.itemsize
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        whole_RB = torch.frombuffer(memory, dtype=part_PB.dtype).view(shape)
    for start in range(0, num_rows, len(part_PB)):
        some_RB = whole_RB[start : start + len(part_PB)]
        some_RB.copy_(part_PB[: len(some_RB)])
    return whole_RB
