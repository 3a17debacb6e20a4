"""Inputs of a sparse Adam step: hyperparameters, moments, and reads grouped by row."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class RowGroups:
    """L reads of U distinct rows, grouped by row; reads of one row keep their order.

    Attributes:
        rows_U: int64, the row of each group. ``group_rows`` sorts them; the operations on groups
            take them in any order, such as the places of copied rows.
        starts_U1: int64 offsets; the u-th row's reads are ``[starts[u], starts[u + 1])``.
        tokens_L: int64, the token of each read.
        weights_L: the weight of each read, fp32 (fp64 for fp64 weights).
    """

    rows_U: Tensor
    starts_U1: Tensor
    tokens_L: Tensor
    weights_L: Tensor


@dataclass(frozen=True)
class AdamStep:
    """Hyperparameters of one step; with ``scale`` 1 they match torch.optim.SparseAdam.

    Attributes:
        scale: factor for the gradients, for clipping.
        step_size: the bias-corrected learning rate of step t:
            ``lr * sqrt(1 - beta2 ** t) / (1 - beta1 ** t)``; row-wise without ``beta1``.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the square root of the second moment.
    """

    scale: float
    step_size: float
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def at(
        cls,
        number: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        scale: float = 1.0,
        is_row_wise: bool = False,
    ) -> "AdamStep":
        """The step with this number; the first is 1."""
        beta1, beta2 = betas
        began = 1.0 if is_row_wise else 1 - beta1**number
        step_size = float(lr * (1 - beta2**number) ** 0.5 / began)
        return cls(scale, step_size, beta1, beta2, eps)


class AdamMoments(NamedTuple):
    """Adam's moments, all initially 0: two per value, or one per row.

    ``first_RV`` is ``[R, V]``, or None for the row-wise variant. ``second`` is ``[R, V]``, or
    ``[R]`` for the row-wise variant. They have the table's dtype; two per value may be bf16.
    """

    first_RV: Tensor | None
    second: Tensor
