"""Custom operators of torch for the operations: their shapes and gradients, for torch.compile.

A value table is three operands here: a tensor of values or records, the row format ("" for
values), and V.

The operators check no operand: ``operations`` checks them before, once a call. torch may call an
operator again with operands of its derivatives or of a traced graph, which were checked there.

Letters: T tokens, H heads, N subkeys per half, K rows per head, R rows of V values, U distinct
rows.
"""

from typing import Any, cast

import torch
from torch import Tensor

from memory_ops import backends
from memory_ops.checks import Table, accumulation_dtype
from memory_ops.row_formats import RowFormat, RowRecords


def operands_of(table: Table) -> tuple[Tensor, str, int]:
    """The three operands of a value table."""
    if isinstance(table, RowRecords):
        return table.records_RB, table.row_format, table.value_dim
    return table, "", table.shape[1]


def _from_operands(table: Tensor, row_format: str, value_dim: int) -> Table:
    if not row_format:
        return table
    return RowRecords(table, cast(RowFormat, row_format), value_dim)


def _sum_dtype(table: Tensor, row_format: str) -> torch.dtype:
    return torch.float32 if row_format else accumulation_dtype(table.dtype)


@torch.library.custom_op("memplus::product_topk", mutates_args=())
def product_topk(half_scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``operations.product_topk`` without checks.

    Takes fp32 or fp64 scores ``[T, H, 2, N]`` and K. Returns row ids int64 ``[T, H, K]``, and
    weights ``[T, H, K]`` in the scores' dtype.
    """
    return backends.for_topk(half_scores, top_k).product_topk(half_scores, top_k)


@product_topk.register_fake
def _(half_scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads = half_scores.shape[:2]
    weights = half_scores.new_empty((num_tokens, num_heads, top_k))
    return torch.empty_like(weights, dtype=torch.int64), weights


@torch.library.custom_op("memplus::gather_rows", mutates_args=())
def gather_rows(
    table: Tensor, row_format: str, value_dim: int, rows: Tensor, weights: Tensor
) -> Tensor:
    """``operations.gather_rows`` without checks.

    Takes values ``[R, V]`` in a floating dtype, or uint8 records ``[R, B]`` of B bytes; row ids
    int64 ``[T, H, K]``; and floating weights ``[T, H, K]``. Returns sums ``[T, V]`` in fp32 (fp64
    for fp64 values).
    """
    value_table = _from_operands(table, row_format, value_dim)
    return backends.for_table(value_table, weights).gather_rows(value_table, rows, weights)


@gather_rows.register_fake
def _(table: Tensor, row_format: str, value_dim: int, rows: Tensor, weights: Tensor) -> Tensor:
    dtype = _sum_dtype(table, row_format)
    return weights.new_empty((rows.shape[0], value_dim), dtype=dtype)


@torch.library.custom_op("memplus::row_dots", mutates_args=())
def row_dots(table: Tensor, row_format: str, value_dim: int, rows: Tensor, x: Tensor) -> Tensor:
    """``operations.row_dots`` without checks.

    Takes values ``[R, V]`` in a floating dtype, or uint8 records ``[R, B]`` of B bytes; row ids
    int64 ``[T, H, K]``; and floating vectors ``[T, V]``. Returns products ``[T, H, K]`` in fp32
    (fp64 for fp64 values).
    """
    value_table = _from_operands(table, row_format, value_dim)
    return backends.for_table(value_table, x).row_dots(value_table, rows, x)


@row_dots.register_fake
def _(table: Tensor, row_format: str, value_dim: int, rows: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(rows.shape, dtype=_sum_dtype(table, row_format))


@torch.library.custom_op("memplus::row_gradients", mutates_args=())
def row_gradients(rows: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """``operations.row_gradients`` without checks.

    Takes row ids int64 ``[T, H, K]``, floating weights ``[T, H, K]`` and gradients ``[T, V]``.
    Returns the rows read, int64 ``[U]``, and their gradients ``[U, V]`` in fp32 (fp64 for an fp64
    gradient).
    """
    return backends.for_gradients(weights, grad).row_gradients(rows, weights, grad)


@row_gradients.register_fake
def _(rows: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    num_distinct = torch.library.get_ctx().new_dynamic_size()
    sums = grad.new_empty((num_distinct, grad.shape[1]), dtype=accumulation_dtype(grad.dtype))
    return rows.new_empty(num_distinct), sums


# The gradient of each operation is computed by the others.


def _save_topk(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _topk_backward(ctx: Any, _: Tensor, grad_THK: Tensor) -> tuple[Tensor, None]:
    half_scores_TH2N, rows_THK, weights_THK = ctx.saved_tensors
    num_subkeys = half_scores_TH2N.shape[3]
    subkeys_TH2K = torch.stack((rows_THK // num_subkeys, rows_THK % num_subkeys), dim=2)
    mean_TH1 = (grad_THK * weights_THK).sum(dim=-1, keepdim=True)
    scores_THK = weights_THK * (grad_THK - mean_TH1)
    # if all scores are -inf, the weights are uniform and depend on no score
    chosen_THK = half_scores_TH2N.gather(3, subkeys_TH2K).sum(dim=2)
    none_TH1 = chosen_THK.isneginf().all(dim=-1, keepdim=True)
    scores_THK = scores_THK.masked_fill(none_TH1, 0.0)
    both_TH2K = scores_THK.unsqueeze(2).expand(subkeys_TH2K.shape)
    return torch.zeros_like(half_scores_TH2N).scatter_add(3, subkeys_TH2K, both_TH2K), None


def _save_table(ctx: Any, inputs: tuple[Tensor, str, int, Tensor, Tensor], output: Tensor) -> None:
    table, ctx.row_format, ctx.value_dim, rows, other = inputs
    ctx.save_for_backward(table, rows, other)


def _gather_backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
    table, rows, weights = ctx.saved_tensors
    grad_table = grad_weights = None
    if ctx.needs_input_grad[4]:
        dots = row_dots(table, ctx.row_format, ctx.value_dim, rows, grad_TV)
        grad_weights = dots.to(weights.dtype)
    if ctx.needs_input_grad[0]:
        grad_table = _sparse_gradient(table, rows, weights, grad_TV)
    return grad_table, None, None, None, grad_weights


def _dots_backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
    table, rows, x = ctx.saved_tensors
    grad_table = grad_x = None
    if ctx.needs_input_grad[4]:
        summed = gather_rows(table, ctx.row_format, ctx.value_dim, rows, grad_THK)
        grad_x = summed.to(x.dtype)
    if ctx.needs_input_grad[0]:
        grad_table = _sparse_gradient(table, rows, grad_THK, x)
    return grad_table, None, None, None, grad_x


def _sparse_gradient(table: Tensor, rows: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    rows_U, sums_UV = row_gradients(rows, weights, grad)
    return torch.sparse_coo_tensor(
        rows_U.unsqueeze(0),
        sums_UV.to(table.dtype),
        table.shape,
        is_coalesced=True,
        check_invariants=False,
    )


product_topk.register_autograd(_topk_backward, setup_context=_save_topk)
gather_rows.register_autograd(_gather_backward, setup_context=_save_table)
row_dots.register_autograd(_dots_backward, setup_context=_save_table)
