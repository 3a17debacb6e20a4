"""Random rows of every dtype that a table may have."""

from typing import cast

import torch
from torch import Tensor

from benchmarks.read_limits import DRAWN_ROWS
from memory_ops.operations import quantize_rows
from memory_ops.row_formats import ROW_FORMATS, RowFormat

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES = (*PLAIN, *ROW_FORMATS)


def drawn_rows(dtype: str, width: int) -> Tensor:
    """``DRAWN_ROWS`` of them, ``[R, V]`` or records ``[R, B]``, for ``repeated``."""
    values_PV = torch.randn(DRAWN_ROWS, width)
    if dtype in PLAIN:
        return values_PV.to(PLAIN[dtype])
    return quantize_rows(values_PV, cast(RowFormat, dtype)).records_RB
