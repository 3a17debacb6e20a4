"""The operations of a sparse optimizer of value tables: gradients by row, their norm, Adam.

They are part of ``operations``, which callers import.
"""

import torch
from torch import Tensor

from memory_ops import backends, custom_operators
from memory_ops.checks import check_gradients, reject_tangents
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gather_rows`` in its table: of the rows that were read.

        grad_row[r] = sum of weights[t,h,k] * grad[t] over all (t, h, k) that read r

    Not differentiable itself.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``: K for each of T tokens and H heads.
        weights_THK: one weight per row id, fp16, bf16, fp32 or fp64, ``[T, H, K]``.
        grad_TV: the gradient of the gathered sums, fp16, bf16, fp32 or fp64, ``[T, V]``: V values
            per token.

    Returns:
        The U distinct rows read, int64 ``[U]`` in ascending order, and their gradients, ``[U, V]``
        in fp32 (fp64 for an fp64 gradient).

    Raises:
        ValueError: rows and weights differ in shape, the gradient is not ``[T, V]``, or an input
            has another dtype or device.
        IndexError: a row id is negative.
    """
    check_gradients(rows_THK, weights_THK, grad_TV)
    reject_tangents(weights_THK, grad_TV)
    gradients: tuple[Tensor, Tensor] = custom_operators.row_gradients(
        rows_THK, weights_THK, grad_TV
    )
    return gradients


def group_rows(rows_THK: Tensor, weights_THK: Tensor) -> RowGroups:
    """Sort reads by row; the reads of one row keep their order. Not differentiable.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``: K for each of T tokens and H heads.
        weights_THK: one weight per row id, fp16, bf16, fp32 or fp64, ``[T, H, K]``.

    Returns:
        The L = T * H * K reads, grouped by the U distinct rows: ``rows_U`` int64 ``[U]`` in
        ascending order; ``starts_U1`` int64 ``[U + 1]``, offsets of each row's reads; for each read
        its token, ``tokens_L`` int64 ``[L]``, and its weight, ``weights_L`` ``[L]`` in fp32 (fp64
        for fp64 weights).

    Raises:
        ValueError: rows and weights differ in shape, or one of them has another dtype.
        IndexError: a row id is negative.
    """
    return backends.for_groups(weights_THK).group_rows(rows_THK, weights_THK)


def squared_norm(groups: RowGroups, grad_TV: Tensor) -> float:
    """The squared norm of a table's gradient: its part of the norm that clipping uses.

        sum over the rows r of |sum of weight * grad[token] over the reads of r| ** 2

    Waits for the device. Not differentiable.

    Args:
        groups: L reads by U distinct rows, from ``group_rows``: int64 ``[U]``, ``[U + 1]`` and
            ``[L]``, and weights ``[L]`` in fp32 or fp64.
        grad_TV: the gradient of the gathered sums, fp16, bf16, fp32 or fp64, ``[T, V]``: V values
            for each of T tokens.

    Returns:
        The sum of the squares of all values of the table's gradient.

    Raises:
        ValueError: the gradient is not ``[T, V]``, has another dtype or device, or has no row for a
            token of the groups. Tokens are not checked on a GPU.
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

    "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980), its bias corrections in
    ``step_size``. Rows that were not read do not change, nor do their moments, as in
    torch.optim.SparseAdam. Moments in bf16 are rounded to nearest when they are stored; a row's
    update uses them before that.

    Args:
        table_RV: R rows of V values, fp32 or fp64, ``[R, V]``, contiguous.
        moments: Adam's moments m and v, each ``[R, V]``, or the row-wise v alone, ``[R]``.
            Contiguous, in the table's dtype; m and v of an fp32 table may be bf16.
        groups: L reads by U distinct rows in [0, R), from ``group_rows``: int64 ``[U]``,
            ``[U + 1]`` and ``[L]``, and weights ``[L]`` in fp32 or fp64.
        grad_TV: the gradient of the gathered sums, fp16, bf16, fp32 or fp64, ``[T, V]``: one for
            each of T tokens.
        step: the hyperparameters: ``scale``, a factor for the gradients, such as that of clipping;
            ``step_size``, the learning rate with the bias corrections of this step; ``beta1`` and
            ``beta2``, the decays of m and v; ``eps``, which keeps the divisor from 0.

    Raises:
        ValueError: table, moments or gradient do not match in shape, dtype or device, or are not
            contiguous; or a token of the groups has no gradient, which is not checked on a GPU.
        IndexError: a row id lies outside the table. Not checked on a GPU.
    """
    backend = backends.for_groups(groups.weights_L, grad_TV, table_RV)
    with torch.no_grad():
        backend.sparse_adam(table_RV, moments, groups, grad_TV, step)
