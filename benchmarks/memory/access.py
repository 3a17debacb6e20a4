"""Access patterns of table rows: recorded from a model, Zipf-distributed, or uniform."""

from typing import Protocol

import torch
from torch import Tensor

from benchmarks.row_trace import AccessTrace

_SPREAD = 0x9E3779B97F4A7C15 >> 1 | 1


class RowAccess(Protocol):
    """Rows that the tokens of many sequences read in a table."""

    def rows(self, sequence: int, position: int, memory: int, *, warm_up: bool = False) -> Tensor:
        """The int64 rows, ``[H, K]``, that one token reads in memory layer number ``memory``.

        Warm-up rows differ from the timed rows.
        """
        ...


class RecordedAccess:
    """The reads of a recorded trace, mapped to a table of another size.

    A table that is n times larger splits each recorded row into n rows. The head's best row selects
    one of them, as finer keys would depend on the text. A smaller table merges neighbouring rows.
    """

    def __init__(self, trace: AccessTrace, num_rows: int) -> None:
        self._rows_TMHK = torch.from_numpy(trace.rows_TMHK)
        self._num_recorded, self._num_rows = trace.counts_MR.shape[1], num_rows

    def rows(self, sequence: int, position: int, memory: int, *, warm_up: bool = False) -> Tensor:
        """Sequences start at evenly spread positions; the trace's first half is for warm-up."""
        half = len(self._rows_TMHK) // 2
        position_in_half = (sequence * _SPREAD + position) % half
        rows_HK = self._rows_TMHK[position_in_half if warm_up else half + position_in_half, memory]
        if self._num_rows <= self._num_recorded:
            return torch.floor_divide(rows_HK, self._num_recorded // self._num_rows)
        parts = self._num_rows // self._num_recorded
        # the high bits of a product with an odd number are evenly spread
        mixed_HK = ((rows_HK + rows_HK[:, :1] * _SPREAD) * _SPREAD) >> 32
        return torch.add(mixed_HK % parts, rows_HK, alpha=parts)


class DrawnAccess:
    """Independent random rows: uniform, or Zipf (the r-th most frequent has a share of 1 / r)."""

    def __init__(self, num_rows: int, shape: tuple[int, int], is_zipf: bool) -> None:
        self._num_rows, self._shape = num_rows, shape
        self._generator = torch.Generator().manual_seed(0)
        self._sums_R: Tensor | None = None
        if is_zipf:
            self._sums_R = (1 / torch.arange(1, num_rows + 1, dtype=torch.float64)).cumsum(0)
            self._order_R = torch.randperm(num_rows, generator=self._generator)

    def rows(self, sequence: int, position: int, memory: int, *, warm_up: bool = False) -> Tensor:
        """New random rows at each call."""
        if self._sums_R is None:
            return torch.randint(self._num_rows, self._shape, generator=self._generator)
        draws_HK = torch.rand(self._shape, generator=self._generator, dtype=torch.float64)
        ranks_HK = torch.searchsorted(self._sums_R, draws_HK * self._sums_R[-1])
        return self._order_R[ranks_HK.clamp_(max=self._num_rows - 1)]
