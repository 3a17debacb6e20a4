"""The collectives of tensor-parallel ranks, whatever carries them."""

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """The ranks of one model. All call the same methods in the same order.

    Results have the same bits on all ranks.

    Attributes:
        rank: the index of this rank.
        size: the number of ranks.
    """

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks. It may overwrite ``x``."""
        ...

    def gather_columns(self, x_TC: Tensor) -> Tensor:
        """The columns of all ranks, ``[T, size * C]``, in the order of the ranks."""
        ...

    def exchange_columns(self, x_TV: Tensor) -> Tensor:
        """This rank's columns, ``[T, V / size]``, of the sum of ``x`` over all ranks."""
        ...
