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
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from memory_ops import backends, custom_operators
from memory_ops.checks import Table, check_gradients, check_rows, check_scores, check_vectors
from memory_ops.custom_operators import operands_of
from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import RowFormat, RowRecords
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups


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
        top_k: K, from 1 to N.

    Returns:
        ``rows_THK`` int64 in [0, N * N) and ``weights_THK`` in the scores' dtype, both
        ``[T, H, K]``, best row first.

    Raises:
        ValueError: the scores have another shape or dtype, or ``top_k`` lies outside [1, N].
    """
    check_scores(half_scores_TH2N, top_k)
    _reject_tangents(half_scores_TH2N)
    rows_THK, weights_THK = custom_operators.product_topk(half_scores_TH2N, top_k)
    return rows_THK, weights_THK


def gather_rows(table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
    """Sum weighted table rows over heads and choices: ``out[t] = sum_hk w[t,h,k] * table[row]``.

    Differentiable in the weights, and in a table of floats: its gradient is a coalesced sparse
    tensor of the rows read. Records get no gradient. torch.compile breaks its graph here if the
    table needs a gradient.

    Args:
        table: the value table: ``[R, V]`` in fp16, bf16, fp32 or fp64, or the ``RowRecords`` of a
            quantized one.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R): K for each token and head.
        weights_THK: one weight per row, floating, ``[T, H, K]``.

    Returns:
        ``out_TV``, ``[T, V]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: rows and weights differ in shape, an input has another dtype or device, or the
            table is not a matrix.
        IndexError: a row id lies outside the table. On a GPU, row ids are not checked.
    """
    check_rows(table, rows_THK, weights_THK)
    _reject_tangents(table, weights_THK)
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

    Rows that a patch does not have add nothing. Tokens without patches do not change. The patches
    count the rows read and found. Not differentiable. Not registered for torch.compile.

    Args:
        out_TV: the sums of ``gather_rows``, fp32 or fp64, ``[T, V]``.
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.
        patches: the patches of the T tokens.

    Raises:
        ValueError: the shapes do not match, or the sums have another dtype.
    """
    backend = backends.for_patches(out_TV)
    backend.add_patched_rows(out_TV, rows_THK, weights_THK, patches)


def quantize_rows(values_RV: Tensor, row_format: RowFormat) -> RowRecords:
    """Round rows to ``row_format``, for a table of about V bytes per row, or half of that.

    ``memory_ops.row_formats`` describes the formats: int8 and fp8 have one scale per row, int4 one
    per 32 values, int4_row one per row. Not differentiable. Not registered for torch.compile.

    Args:
        values_RV: ``[R, V]``, floating.
        row_format: "int8", "fp8", "int4" or "int4_row".

    Returns:
        The records, ``records_RB`` uint8 ``[R, row_bytes(row_format, V)]``, which the operations
        take as a table.

    Raises:
        ValueError: the values are not a floating-point matrix, or one of them is not finite, or
            too large for int4_row (524,160 or more).
    """
    return backends.for_rounding(values_RV).quantize_rows(values_RV, row_format)


def row_dots(table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
    """Inner products of table rows and each token's vector: ``table[row[t,h,k]] . x[t]``.

    This is the gradient of ``gather_rows`` in its weights, and the first half of PEER.
    Differentiable in the vectors, and in the table like ``gather_rows``.

    Args:
        table: as for ``gather_rows``.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        x_TV: one vector per token, floating, ``[T, V]``.

    Returns:
        ``dots_THK``, ``[T, H, K]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: the shapes do not match, or an input has another dtype or device.
        IndexError: a row id lies outside the table. On a GPU, row ids are not checked.
    """
    check_vectors(table, rows_THK, x_TV)
    _reject_tangents(table, x_TV)
    dots_THK: Tensor
    if torch.compiler.is_compiling() and _needs_gradient(table):
        from memory_ops import uncompiled

        dots_THK = uncompiled.row_dots(*operands_of(table), rows_THK, x_TV)
    else:
        dots_THK = custom_operators.row_dots(*operands_of(table), rows_THK, x_TV)
    return dots_THK


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gather_rows`` in its table: of the rows that were read.

        grad_row[r] = sum of weights[t,h,k] * grad[t] over all (t, h, k) that read r

    Not differentiable itself.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.
        grad_TV: the gradient of the gathered sums, floating, ``[T, V]``.

    Returns:
        The U distinct rows read, int64 ``[U]`` in ascending order, and their gradients, ``[U, V]``
        in fp32 (fp64 for an fp64 gradient).

    Raises:
        ValueError: the shapes do not match.
        IndexError: a row id is negative.
    """
    check_gradients(rows_THK, weights_THK, grad_TV)
    _reject_tangents(weights_THK, grad_TV)
    gradients: tuple[Tensor, Tensor] = custom_operators.row_gradients(
        rows_THK, weights_THK, grad_TV
    )
    return gradients


def group_rows(rows_THK: Tensor, weights_THK: Tensor) -> RowGroups:
    """Sort reads by row; the reads of one row keep their order. Not differentiable.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.

    Returns:
        The U distinct rows read, in ascending order, and for each its L reads: token and weight.

    Raises:
        ValueError: rows and weights differ in shape.
        IndexError: a row id is negative.
    """
    return backends.for_groups(weights_THK).group_rows(rows_THK, weights_THK)


def squared_norm(groups: RowGroups, grad_TV: Tensor) -> float:
    """The squared norm of a table's gradient: its part of the norm that clipping uses.

    Args:
        groups: the reads; see ``group_rows``.
        grad_TV: the gradient of the gathered sums, floating, ``[T, V]``.

    Raises:
        ValueError: a token of the groups has no gradient.
    """
    return backends.for_groups(groups.weights_L, grad_TV).squared_norm(groups, grad_TV)


def sparse_adam(
    table_RV: Tensor, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
) -> None:
    """Update the rows that were read, and their moments, by one step of Adam, in place.

        g = scale * sum of weight * grad[token] over a row's reads
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g
        row -= step_size * m / (sqrt(v) + eps)

    The row-wise variant has one moment per row:

        v = beta2 v + (1 - beta2) mean(g g);  row -= step_size * g / (sqrt(v) + eps)

    Rows that were not read do not change, nor do their moments, as in torch.optim.SparseAdam.
    Moments in bf16 are rounded to nearest when they are stored; a row's update uses them before
    that.

    Args:
        table_RV: the rows, fp32 or fp64, contiguous.
        moments: Adam's moments, contiguous, in the table's dtype, or in bf16: two moments per value
            of an fp32 table.
        groups: the reads; see ``group_rows``.
        grad_TV: the gradient of the gathered sums, floating, ``[T, V]``.
        step: the hyperparameters.

    Raises:
        ValueError: shapes or dtypes do not match.
        IndexError: a row id lies outside the table.
    """
    backend = backends.for_groups(groups.weights_L, grad_TV, table_RV)
    with torch.no_grad():
        backend.sparse_adam(table_RV, moments, groups, grad_TV, step)


def expert_lookup(
    down: Table, up: Table, rows_THK: Tensor, weights_THK: Tensor, x_TD: Tensor
) -> Tensor:
    """PEER's single-neuron experts: ``sum_hk w * gelu(down[row] . x) * up[row]``.

    "Mixture of a Million Experts" (arXiv 2407.04153), with the exact gelu of its code.
    Differentiable in both tables, the weights and the vectors.

    Args:
        down: u, the experts' input rows, ``[R, D]``, a table as for ``gather_rows``.
        up: v, the experts' output rows, ``[R, V]``, a table as for ``gather_rows``.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        weights_THK: one weight per expert, floating, ``[T, H, K]``.
        x_TD: one vector per token, floating, ``[T, D]``.

    Returns:
        ``out_TV``, ``[T, V]`` in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: the shapes do not match.
        IndexError: a row id lies outside a table.
    """
    activations_THK = functional.gelu(row_dots(down, rows_THK, x_TD))
    return gather_rows(up, rows_THK, weights_THK * activations_THK)


def _reject_tangents(*operands: Table) -> None:
    # torch's custom operators silently drop the tangents of tensors that need no gradient
    for operand in operands:
        if isinstance(operand, RowRecords):
            continue
        if forward_ad.unpack_dual(operand).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError("memory_ops: forward-mode derivatives are not supported")


def _needs_gradient(table: Table) -> bool:
    return not isinstance(table, RowRecords) and table.requires_grad and torch.is_grad_enabled()
