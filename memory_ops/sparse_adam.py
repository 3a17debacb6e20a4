"""Inputs of a sparse Adam step: hyperparameters, moments, and reads grouped by row."""

from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class AdamStep:
    """The numbers of one step, of torch.optim.SparseAdam's where ``scale`` is 1.

    Attributes:
        scale: what gradients are multiplied by first, for clipping.
        step_size: the learning rate, corrected for moments that began at 0:
            ``lr * sqrt(1 - beta2 ** t) / (1 - beta1 ** t)`` in step t; row-wise without beta1.
        beta1: how much of the first moment is kept.
        beta2: how much of the second.
        eps: added to the root of the second.
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
        """The step with this number, from 1 on."""
        beta1, beta2 = betas
        began = 1.0 if is_row_wise else 1 - beta1**number
        step_size = float(lr * (1 - beta2**number) ** 0.5 / began)
        return cls(scale, step_size, beta1, beta2, eps)


class AdamMoments(NamedTuple):
    """What is kept of past gradients: both moments of each value, or one a row.

    ``first_RV`` is ``[R, V]``, or None for the row-wise variant; ``second`` is ``[R, V]``, or
    ``[R]``. All begin at 0.
    """

    first_RV: Tensor | None
    second: Tensor
