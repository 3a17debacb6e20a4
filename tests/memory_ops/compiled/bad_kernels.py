"""A deliberately slow gather kernel: the machine-code checks must reject it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
ROWS = 16


def gather_of_run_time_width(table_RV: Tensor, rows_TC: Tensor) -> Tensor:
    """Sum rows whose width the compiler does not know, so that it loads one value at a time."""
    width = table_RV.shape[1]
    out_TV = torch.empty(len(rows_TC), width)
    grid = (len(rows_TC), triton.cdiv(width, BLOCK))
    _gather[grid](
        table_RV, rows_TC, out_TV, width, rows_TC.shape[1], ROWS=ROWS, BLOCK=BLOCK, num_warps=1
    )
    return out_TV


@triton.jit
def _gather(
    table_ptr, rows_ptr, out_ptr, width, num_choices, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t, v] = sum over c of table[rows[t, c], v]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < width
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_choices, ROWS):
        choices = start + tl.arange(0, ROWS)
        live = choices < num_choices
        rows = tl.load(rows_ptr + token * num_choices + choices, mask=live, other=0)
        values = tl.load(
            table_ptr + rows[:, None] * width + columns[None, :],
            mask=live[:, None] & in_row[None, :],
            other=0.0,
        )
        sums += tl.sum(values.to(tl.float32), axis=0)
    tl.store(out_ptr + token * width + columns, sums, mask=in_row)
