"""References to rows, those to one row side by side: what a table's gradient is made of."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowGroups:
    """L reads of U distinct rows, by row, then in the order of the reads.

    Attributes:
        rows_U: int64, ascending.
        starts_U1: int64; reads ``[starts[u], starts[u + 1])`` are those of the u-th row.
        tokens_L: int64; which token read.
        weights_L: fp32 (fp64 for fp64 weights).
    """

    rows_U: Tensor
    starts_U1: Tensor
    tokens_L: Tensor
    weights_L: Tensor
