"""Memory lookups as kernel cases: top-K of scores, weighted rows, and dot products."""

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch

from benchmarks.drawn_tables import PLAIN, drawn_rows
from benchmarks.gpu.drawn_models import GPU
from benchmarks.gpu.kernel_inputs import KernelCase, KernelInputs
from benchmarks.memory_variant import NUM_HEADS, TOP_K
from memory_ops import reference
from memory_ops.checks import Table
from memory_ops.row_formats import RowFormat, RowRecords


def lookup_cases(width: int, num_subkeys: int, num_tokens: int) -> Iterator[KernelCase]:
    """Lookups of N subkeys per half and rows of this width, in every format."""
    from memory_ops import triton_kernels

    yield KernelCase(
        f"top-K of 2 x {num_subkeys}",
        triton_kernels.product_topk,
        reference.product_topk,
        partial(_scores, num_subkeys, num_tokens),
    )
    for dtype in ("bf16", "int8", "int4", "fp8"):
        yield KernelCase(
            f"weighted rows {dtype}",
            triton_kernels.gather_rows,
            reference.gather_rows,
            partial(_gather, width, dtype, num_tokens),
        )
    yield KernelCase(
        "row dots bf16",
        triton_kernels.row_dots,
        reference.row_dots,
        partial(_dots, width, num_tokens),
    )


def _scores(num_subkeys: int, num_tokens: int) -> KernelInputs:
    scores_TH2N = torch.randn(num_tokens, NUM_HEADS, 2, num_subkeys, device=GPU)
    return KernelInputs((scores_TH2N, TOP_K), num_bytes=scores_TH2N.nbytes)


def _gather(width: int, dtype: str, num_tokens: int) -> KernelInputs:
    table, row_bytes = _table(width, dtype)
    rows_THK = _rows(num_tokens)
    weights_THK = torch.rand(rows_THK.shape, device=GPU)
    return KernelInputs((table, rows_THK, weights_THK), num_bytes=rows_THK.numel() * row_bytes)


def _dots(width: int, num_tokens: int) -> KernelInputs:
    table, row_bytes = _table(width, "bf16")
    rows_THK, x_TV = _rows(num_tokens), torch.randn(num_tokens, width, device=GPU)
    return KernelInputs((table, rows_THK, x_TV), num_bytes=rows_THK.numel() * row_bytes)


def _rows(num_tokens: int) -> torch.Tensor:
    return torch.randint(_NUM_ROWS, (num_tokens, NUM_HEADS, TOP_K), device=GPU)


_NUM_ROWS = 2**15


def _table(width: int, dtype: str) -> tuple[Table, int]:
    """Rows on the device, more than its caches hold, and the bytes of a row."""
    part_PB = drawn_rows(dtype, width).to(GPU)
    rows_RB = part_PB.repeat(_NUM_ROWS // len(part_PB), 1)
    row_bytes = rows_RB[0].nbytes
    if dtype in PLAIN:
        return rows_RB, row_bytes
    return RowRecords(rows_RB, cast(RowFormat, dtype), width), row_bytes
