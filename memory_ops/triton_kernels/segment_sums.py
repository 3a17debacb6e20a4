"""Sums of grouped reads for the training kernels; rows with very many reads are summed in parts.

Shape suffixes: T tokens, L reads, U distinct rows among them, C whole chunks of reads, V value
width.

Reads are sorted by row. A chunk is ``CHUNK`` adjacent reads. If all of them read one row, a program
sums the chunk first. The program of a row then adds the sums of the row's chunks, and its reads
that lie in no such chunk: fewer than two chunks. So a row that every token reads does not occupy
one program for long, and sums are added in a fixed order, without atomics: the same input gives the
same bits.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.sparse_adam import RowGroups
from memory_ops.triton_kernels.launch import RowLaunch, constant_row_stride, on_device_of
from memory_ops.triton_kernels.table_view import ValueKind, value_kind

# by the kind of the gradient's values
GRADIENT_LAUNCHES: dict[ValueKind, RowLaunch] = {
    "fp32": RowLaunch(rows=8, columns=128),
    "fp16": RowLaunch(rows=8, columns=256),
    "bf16": RowLaunch(rows=8, columns=256),
}
CHUNK = 256


class SegmentSums:
    """Arguments of the kernels that call ``segment_sums``; the sums of chunks are computed here.

    Attributes:
        grid: one program per row and block of columns.
        operands: the first arguments: tokens, weights, starts, gradients, sums of chunks.
        constants: the constants that ``segment_sums`` needs, and the compiler's options.
    """

    def __init__(self, groups: RowGroups, grad_TV: Tensor) -> None:
        """Sum the chunks of ``groups``, on the gradients ``grad_TV``.

        Raises:
            ValueError: the gradient is not fp32, fp16 or bf16.
        """
        launch = GRADIENT_LAUNCHES[value_kind("grad", grad_TV)]
        grad_TV = grad_TV if grad_TV.stride(1) == 1 else grad_TV.contiguous()
        width, num_chunks = grad_TV.shape[1], len(groups.tokens_L) // CHUNK
        blocks = triton.cdiv(width, launch.columns)
        self.grid = (len(groups.rows_U), blocks)
        self.constants: dict[str, Any] = {
            "VALUE_DIM": width,
            "GRAD_STRIDE": constant_row_stride(grad_TV),
            "ROWS": launch.rows,
            "BLOCK": launch.columns,
            "CHUNK": CHUNK,
            **launch.options(),
        }
        chunks_CV = torch.empty((num_chunks, width), dtype=torch.float32, device=grad_TV.device)
        reads = groups.tokens_L, groups.weights_L, groups.starts_U1, grad_TV
        self.operands = (*reads, chunks_CV)
        if chunks_CV.numel():
            firsts_C = torch.arange(0, num_chunks * CHUNK, CHUNK, device=grad_TV.device)
            segments_C = torch.searchsorted(groups.starts_U1, firsts_C, right=True) - 1
            with on_device_of(grad_TV):
                _sum_chunks[(num_chunks, blocks)](*self.operands, segments_C, **self.constants)


@triton.jit
def segment_sums(
    tokens_ptr,
    weights_ptr,
    starts_ptr,
    grad_ptr,
    chunks_ptr,
    segment,
    columns,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """fp32 sums, ``[BLOCK]``: of weights[l] * grad[tokens[l]] over the reads l of a segment."""
    begin, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
    first, last = (begin + CHUNK - 1) // CHUNK, end // CHUNK
    whole = tl.maximum(last - first, 0) * CHUNK
    # reads before the first whole chunk, then those after the last one
    before = tl.where(whole > 0, first * CHUNK - begin, end - begin)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, end - begin - whole, ROWS):
        reads = start + tl.arange(0, ROWS)
        places = begin + reads + tl.where(reads < before, 0, whole)
        sums += _tile_sums(
            tokens_ptr, weights_ptr, grad_ptr, places, end, columns, VALUE_DIM, GRAD_STRIDE
        )
    for start in range(first, last, ROWS):
        chunks = start + tl.arange(0, ROWS)
        mask = (chunks < last)[:, None] & (columns < VALUE_DIM)[None, :]
        parts = tl.load(chunks_ptr + chunks[:, None] * VALUE_DIM + columns, mask=mask, other=0.0)
        sums += tl.sum(parts, axis=0)
    return sums


@triton.jit
def _tile_sums(
    tokens_ptr,
    weights_ptr,
    grad_ptr,
    places,
    end,
    columns,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
):
    """Weighted sums over the reads at some places; places from ``end`` on are left out."""
    live = places < end
    tokens = tl.load(tokens_ptr + places, mask=live, other=0)
    weights = tl.load(weights_ptr + places, mask=live, other=0.0)
    grads = tl.load(
        grad_ptr + tokens[:, None] * GRAD_STRIDE + columns[None, :],
        mask=live[:, None] & (columns < VALUE_DIM)[None, :],
        other=0.0,
    )
    return tl.sum(weights[:, None] * grads.to(tl.float32), axis=0)


@triton.jit
def _sum_chunks(
    tokens_ptr,
    weights_ptr,
    starts_ptr,
    grad_ptr,
    chunks_ptr,
    segments_ptr,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """chunks[c, v] = the sum of chunk c, if the segment of its first read holds all of it."""
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = chunk * CHUNK, chunk * CHUNK + CHUNK
    segment_end = tl.load(starts_ptr + tl.load(segments_ptr + chunk) + 1)
    if end <= segment_end:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, CHUNK, ROWS):
            places = begin + start + tl.arange(0, ROWS)
            sums += _tile_sums(
                tokens_ptr, weights_ptr, grad_ptr, places, end, columns, VALUE_DIM, GRAD_STRIDE
            )
        tl.store(chunks_ptr + chunk * VALUE_DIM + columns, sums, mask=columns < VALUE_DIM)
