"""The public operations on value tables, checked and differentiable.

Shape suffixes: T tokens, H memory heads, N subkeys per half, K rows read per head, R = N * N rows,
V value width. The formulas are those of "Memory Layers at Scale" (arXiv 2412.09764) and "Large
Memory Layers with Product Keys" (arXiv 1907.05242).

An operation runs on the device of its inputs, by the kernels that ``backends`` chooses. All give
the results that ``reference`` computes in plain torch, up to the rounding of sums. Inputs of one
call lie on one device; but a GPU also reads a table in page-locked host memory. Forward-mode
derivatives raise RuntimeError.

Every call goes through torch's dispatcher. This adds 10 to 20 microseconds, which is less than 1 %
of a served or trained step.

The operations of a sparse optimizer are written in ``training_operations``.
"""

import torch
from torch import Tensor
from torch.nn import functional

from memory_ops import backends, custom_operators
from memory_ops.checks import Table, check_rows, check_scores, check_vectors, reject_tangents
from memory_ops.custom_operators import operands_of
from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import RowFormat, RowRecords
from memory_ops.training_operations import group_rows, row_gradients, sparse_adam, squared_norm

__all__ = [
    "add_patched_rows",
    "expert_lookup",
    "gather_rows",
    "group_rows",
    "product_topk",
    "quantize_rows",
    "row_dots",
    "row_gradients",
    "sparse_adam",
    "squared_norm",
]


def product_topk(half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose each head's ``top_k`` best rows among all N * N sums of two half scores.

        I1, I2 = top-K of s1, top-K of s2;  rows = top-K of s1[i] + s2[j];  row id = i * N + j
        weights = softmax(scores of the chosen rows)

    Equal half scores go to the smaller subkey, equal sums to the smaller rank in the first half,
    then in the second. A head whose scores are all -inf gets uniform weights. If scores are NaN,
    the rows are in range and the weights NaN. Differentiable in the scores. The formulas are those
    of "Large Memory Layers with Product Keys" (arXiv 1907.05242).

    Args:
        half_scores_TH2N: scores of both halves, fp32 (or fp64), ``[T, H, 2, N]``: T tokens, H
            heads, N subkeys per half.
        top_k: K, the number of rows that a head reads, from 1 to N.

    Returns:
        ``rows_THK`` int64 in [0, N * N) and ``weights_THK`` in the scores' dtype, both
        ``[T, H, K]``, best row first.

    Raises:
        ValueError: the scores have another shape or dtype, or ``top_k`` lies outside [1, N].
    """
    check_scores(half_scores_TH2N, top_k)
    reject_tangents(half_scores_TH2N)
    rows_THK, weights_THK = custom_operators.product_topk(half_scores_TH2N, top_k)
    return rows_THK, weights_THK


def gather_rows(table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
    """Sum weighted table rows over heads and choices: ``out[t] = sum_hk w[t,h,k] * table[row]``.

    Differentiable in the weights, and in a table of floats: its gradient is a coalesced sparse
    tensor of the rows read. Records get no gradient. torch.compile breaks its graph here if the
    table needs a gradient.

    Args:
        table: the value table: R rows of V values, ``[R, V]`` in fp16, bf16, fp32 or fp64, or the
            ``RowRecords`` of a quantized one.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R): K for each of T tokens and H heads.
        weights_THK: one weight per row id, fp16, bf16, fp32 or fp64, ``[T, H, K]``.

    Returns:
        ``out_TV``, ``[T, V]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: rows and weights differ in shape, an input has another dtype or device, or the
            table is not a matrix.
        IndexError: a row id lies outside the table. On a GPU, row ids are not checked.
    """
    check_rows(table, rows_THK, weights_THK)
    reject_tangents(table, weights_THK)
    out_TV: Tensor
    if torch.compiler.is_compiling() and _needs_gradient(table):
        from memory_ops import uncompiled

        out_TV = uncompiled.gather_rows(*operands_of(table), rows_THK, weights_THK)
    else:
        out_TV = custom_operators.gather_rows(*operands_of(table), rows_THK, weights_THK)
    return out_TV


def add_patched_rows(
    out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches
) -> None:
    """Add to each token's sum what its patches add to the rows that it reads, in place.

        out[t] += sum over the patches of t, over h, k: scale * w[t,h,k] * delta[row[t,h,k]]

    A patch has deltas of V values for some rows, and each token uses it with a scale. Rows that a
    patch does not have add nothing. Tokens without patches do not change. The patches count the
    rows read and found. Not differentiable. Not registered for torch.compile.

    Args:
        out_TV: the sums of ``gather_rows``, fp32 or fp64, ``[T, V]``: V values for each of T
            tokens.
        rows_THK: row ids, int64, ``[T, H, K]``: K for each token and each of H heads.
        weights_THK: one weight per row id, fp16, bf16, fp32 or fp64, ``[T, H, K]``.
        patches: sets of patches with their scales, and the set that each of the T tokens uses,
            ``set_T`` int32 ``[T]`` on the CPU.

    Raises:
        ValueError: rows and weights differ in shape, sums or patches are not those of T tokens, the
            deltas have another width than V, or an input has another dtype.
    """
    backend = backends.for_patches(out_TV)
    backend.add_patched_rows(out_TV, rows_THK, weights_THK, patches)


def quantize_rows(values_RV: Tensor, row_format: RowFormat) -> RowRecords:
    """Round rows to ``row_format``, for a table of about V bytes per row, or half of that.

    ``memory_ops.row_formats`` describes the formats: int8 and fp8 have one scale per row, int4 one
    per 32 values, int4_row one per row. Not differentiable. Not registered for torch.compile.

    Args:
        values_RV: R rows of V values, fp16, bf16, fp32 or fp64, ``[R, V]``.
        row_format: "int8", "fp8", "int4" or "int4_row".

    Returns:
        The records, ``records_RB`` uint8 ``[R, B]`` of B = ``row_bytes(row_format, V)`` bytes,
        which the operations take as a table.

    Raises:
        ValueError: the values are not a floating-point matrix, or one of them is not finite, or
            too large for int4_row (524,160 or more).
    """
    return backends.for_rounding(values_RV).quantize_rows(values_RV, row_format)


def row_dots(table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
    """Inner products of table rows and each token's vector: ``table[row[t,h,k]] . x[t]``.

    This is the gradient of ``gather_rows`` in its weights, and the first half of PEER ("Mixture of
    a Million Experts", arXiv 2407.04153). Differentiable in the vectors, and in a table of floats:
    its gradient is a coalesced sparse tensor of the rows read. Records get no gradient.
    torch.compile breaks its graph here if the table needs a gradient.

    Args:
        table: the value table: R rows of V values, ``[R, V]`` in fp16, bf16, fp32 or fp64, or the
            ``RowRecords`` of a quantized one.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R): K for each of T tokens and H heads.
        x_TV: one vector per token, fp16, bf16, fp32 or fp64, ``[T, V]``.

    Returns:
        ``dots_THK``, ``[T, H, K]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: rows or vectors have another shape, an input has another dtype or device, or the
            table is not a matrix.
        IndexError: a row id lies outside the table. On a GPU, row ids are not checked.
    """
    check_vectors(table, rows_THK, x_TV)
    reject_tangents(table, x_TV)
    dots_THK: Tensor
    if torch.compiler.is_compiling() and _needs_gradient(table):
        from memory_ops import uncompiled

        dots_THK = uncompiled.row_dots(*operands_of(table), rows_THK, x_TV)
    else:
        dots_THK = custom_operators.row_dots(*operands_of(table), rows_THK, x_TV)
    return dots_THK


def expert_lookup(
    down: Table, up: Table, rows_THK: Tensor, weights_THK: Tensor, x_TD: Tensor
) -> Tensor:
    """PEER's single-neuron experts: ``sum_hk w * gelu(down[row] . x) * up[row]``.

    "Mixture of a Million Experts" (arXiv 2407.04153), with the exact gelu of its code.
    Differentiable in both tables, the weights and the vectors.

    Args:
        down: u, the input rows of R experts, D values each: ``[R, D]`` in fp16, bf16, fp32 or
            fp64, or the ``RowRecords`` of a quantized table.
        up: v, their output rows, V values each: ``[R, V]`` in fp16, bf16, fp32 or fp64, or the
            ``RowRecords`` of a quantized table.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R): K experts for each of T tokens and
            H heads.
        weights_THK: one weight per expert, fp16, bf16, fp32 or fp64, ``[T, H, K]``.
        x_TD: one vector per token, fp16, bf16, fp32 or fp64, ``[T, D]``.

    Returns:
        ``out_TV``, ``[T, V]``, accumulated and returned in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: rows and weights differ in shape, the vectors have another shape, an input has
            another dtype or device, or a table is not a matrix.
        IndexError: a row id lies outside a table. On a GPU, row ids are not checked.
    """
    activations_THK = functional.gelu(row_dots(down, rows_THK, x_TD))
    return gather_rows(up, rows_THK, weights_THK * activations_THK)


def _needs_gradient(table: Table) -> bool:
    return not isinstance(table, RowRecords) and table.requires_grad and torch.is_grad_enabled()
