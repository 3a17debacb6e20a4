"""The public operations on value tables, checked and differentiable.

Every call goes through torch's dispatcher. This adds 10 to 20 microseconds, which is less than 1 %
of a served or trained step.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from memory_ops import backends, custom_operators
from memory_ops.checks import (
    Table,
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
    rows_THK, weights_THK = custom_operators.product_topk(half_scores_TH2N, top_k)
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
        out_TV = custom_operators.gather_rows(*_operands_of(table), rows_THK, weights_THK)
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
        dots_THK = custom_operators.row_dots(*_operands_of(table), rows_THK, x_TV)
    return dots_THK


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows read; see ``memory_ops.reference.row_gradients``.

    Not differentiable itself.
    """
    check_gradients(rows_THK, weights_THK, grad_TV)
    _reject_tangents(weights_THK, grad_TV)
    gradients: tuple[Tensor, Tensor] = custom_operators.row_gradients(
        rows_THK, weights_THK, grad_TV
    )
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
