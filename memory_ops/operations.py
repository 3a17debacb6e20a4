"""The public operations: differentiable, and registered as custom operators for torch.compile.

Every call goes through torch's dispatcher. This adds 10 to 20 microseconds, which is less than 1 %
of a served or trained step.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from memory_ops import backends
from memory_ops.checks import (
    Table,
    accumulation_dtype,
    check_gradients,
    check_rows,
    check_scores,
    check_vectors,
)
from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import RowFormat, RowRecords
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups


def product_topk(half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose each head's ``top_k`` best rows; see ``memory_ops.reference.product_topk``.

    Differentiable in the scores. If scores are NaN, the rows are in range and the weights NaN.
    """
    check_scores(half_scores_TH2N, top_k)
    _reject_tangents(half_scores_TH2N)
    rows_THK, weights_THK = _product_topk(half_scores_TH2N, top_k)
    return rows_THK, weights_THK


def gather_rows(table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
    """Sum weighted table rows; see ``memory_ops.reference.gather_rows``.

    Differentiable in the weights, and in a table of floats: its gradient is a coalesced sparse
    tensor of the rows read. Records get no gradient. On a GPU, row ids are not checked.
    torch.compile breaks its graph here if the table needs a gradient.
    """
    check_rows(table, rows_THK, weights_THK)
    _reject_tangents(table, weights_THK)
    out_TV: Tensor
    if torch.compiler.is_compiling() and _needs_gradient(table):
        from memory_ops import uncompiled

        out_TV = uncompiled.gather_rows(*_operands_of(table), rows_THK, weights_THK)
    else:
        out_TV = _gather_rows(*_operands_of(table), rows_THK, weights_THK)
    return out_TV


def add_patched_rows(
    out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches
) -> None:
    """Add what patches add to the rows read; see ``memory_ops.reference.add_patched_rows``.

    Not differentiable. Not registered for torch.compile.
    """
    backend = backends.for_patches(out_TV)
    backend.add_patched_rows(out_TV, rows_THK, weights_THK, patches)


def quantize_rows(values_RV: Tensor, row_format: RowFormat) -> RowRecords:
    """Round rows to ``row_format``; see ``memory_ops.row_formats.quantize_rows``.

    Not differentiable. Not registered for torch.compile.
    """
    return backends.for_rounding(values_RV).quantize_rows(values_RV, row_format)


def row_dots(table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
    """Inner products of rows and vectors; see ``memory_ops.reference.row_dots``.

    Differentiable in the vectors, and in the table like ``gather_rows``.
    """
    check_vectors(table, rows_THK, x_TV)
    _reject_tangents(table, x_TV)
    dots_THK: Tensor
    if torch.compiler.is_compiling() and _needs_gradient(table):
        from memory_ops import uncompiled

        dots_THK = uncompiled.row_dots(*_operands_of(table), rows_THK, x_TV)
    else:
        dots_THK = _row_dots(*_operands_of(table), rows_THK, x_TV)
    return dots_THK


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows read; see ``memory_ops.reference.row_gradients``.

    Not differentiable itself.
    """
    check_gradients(rows_THK, weights_THK, grad_TV)
    _reject_tangents(weights_THK, grad_TV)
    gradients: tuple[Tensor, Tensor] = _row_gradients(rows_THK, weights_THK, grad_TV)
    return gradients


def group_rows(rows_THK: Tensor, weights_THK: Tensor) -> RowGroups:
    """Sort reads by row; see ``memory_ops.reference.group_rows``. Not differentiable."""
    return backends.for_groups(weights_THK).group_rows(rows_THK, weights_THK)


def squared_norm(groups: RowGroups, grad_TV: Tensor) -> float:
    """The squared norm of a table's gradient; see ``memory_ops.reference.squared_norm``."""
    return backends.for_groups(groups.weights_L, grad_TV).squared_norm(groups, grad_TV)


def sparse_adam(
    table_RV: Tensor, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
) -> None:
    """A step of Adam for the rows read; see ``memory_ops.reference.sparse_adam``."""
    backend = backends.for_groups(groups.weights_L, grad_TV, table_RV)
    with torch.no_grad():
        backend.sparse_adam(table_RV, moments, groups, grad_TV, step)


def expert_lookup(
    down: Table, up: Table, rows_THK: Tensor, weights_THK: Tensor, x_TD: Tensor
) -> Tensor:
    """PEER's single-neuron experts; see ``memory_ops.reference.expert_lookup``.

    Differentiable in both tables, the weights and the vectors.
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


def _operands_of(table: Table) -> tuple[Tensor, str, int]:
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
def _product_topk(half_scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return backends.for_topk(half_scores, top_k).product_topk(half_scores, top_k)


@_product_topk.register_fake
def _(half_scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads = half_scores.shape[:2]
    weights = half_scores.new_empty((num_tokens, num_heads, top_k))
    return torch.empty_like(weights, dtype=torch.int64), weights


@torch.library.custom_op("memplus::gather_rows", mutates_args=())
def _gather_rows(
    table: Tensor, row_format: str, value_dim: int, rows: Tensor, weights: Tensor
) -> Tensor:
    value_table = _from_operands(table, row_format, value_dim)
    return backends.for_table(value_table, weights).gather_rows(value_table, rows, weights)


@_gather_rows.register_fake
def _(table: Tensor, row_format: str, value_dim: int, rows: Tensor, weights: Tensor) -> Tensor:
    dtype = _sum_dtype(table, row_format)
    return weights.new_empty((rows.shape[0], value_dim), dtype=dtype)


@torch.library.custom_op("memplus::row_dots", mutates_args=())
def _row_dots(table: Tensor, row_format: str, value_dim: int, rows: Tensor, x: Tensor) -> Tensor:
    value_table = _from_operands(table, row_format, value_dim)
    return backends.for_table(value_table, x).row_dots(value_table, rows, x)


@_row_dots.register_fake
def _(table: Tensor, row_format: str, value_dim: int, rows: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(rows.shape, dtype=_sum_dtype(table, row_format))


@torch.library.custom_op("memplus::row_gradients", mutates_args=())
def _row_gradients(rows: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return backends.for_gradients(weights, grad).row_gradients(rows, weights, grad)


@_row_gradients.register_fake
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
        dots = _row_dots(table, ctx.row_format, ctx.value_dim, rows, grad_TV)
        grad_weights = dots.to(weights.dtype)
    if ctx.needs_input_grad[0]:
        grad_table = _sparse_gradient(table, rows, weights, grad_TV)
    return grad_table, None, None, None, grad_weights


def _dots_backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
    table, rows, x = ctx.saved_tensors
    grad_table = grad_x = None
    if ctx.needs_input_grad[4]:
        summed = _gather_rows(table, ctx.row_format, ctx.value_dim, rows, grad_THK)
        grad_x = summed.to(x.dtype)
    if ctx.needs_input_grad[0]:
        grad_table = _sparse_gradient(table, rows, grad_THK, x)
    return grad_table, None, None, None, grad_x


def _sparse_gradient(table: Tensor, rows: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    rows_U, sums_UV = _row_gradients(rows, weights, grad)
    return torch.sparse_coo_tensor(
        rows_U.unsqueeze(0),
        sums_UV.to(table.dtype),
        table.shape,
        is_coalesced=True,
        check_invariants=False,
    )


_product_topk.register_autograd(_topk_backward, setup_context=_save_topk)
_gather_rows.register_autograd(_gather_backward, setup_context=_save_table)
_row_dots.register_autograd(_dots_backward, setup_context=_save_table)
