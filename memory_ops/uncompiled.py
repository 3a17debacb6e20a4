"""Operators that torch.compile runs and does not trace, because their gradients are sparse.

Imported while a graph is traced, and not before: it loads torch's compiler.
"""

import torch
from torch import Tensor

from memory_ops import custom_operators

_REASON = "memory_ops: the gradient of the table is sparse"


@torch.compiler.disable(reason=_REASON)  # type: ignore[no-untyped-call,untyped-decorator]
def gather_rows(
    table: Tensor, row_format: str, value_dim: int, rows_THK: Tensor, weights_THK: Tensor
) -> Tensor:
    """The operator of ``operations.gather_rows``."""
    out_TV: Tensor = custom_operators.gather_rows(
        table, row_format, value_dim, rows_THK, weights_THK
    )
    return out_TV


@torch.compiler.disable(reason=_REASON)  # type: ignore[no-untyped-call,untyped-decorator]
def row_dots(
    table: Tensor, row_format: str, value_dim: int, rows_THK: Tensor, x_TV: Tensor
) -> Tensor:
    """The operator of ``operations.row_dots``."""
    dots_THK: Tensor = custom_operators.row_dots(table, row_format, value_dim, rows_THK, x_TV)
    return dots_THK
