"""Which rows are read: as recorded from a model, by Zipf's law, or evenly."""

from typing import Protocol

import torch
from torch import Tensor

from benchmarks.access_trace import AccessTrace

_SPREAD = 0x9E3779B97F4A7C15 >> 1 | 1


class RowAccess(Protocol):
    """Rows of token after token of many sequences, in a table of ``num_rows``."""

    def rows(self, sequence: int, position: int, memory: int, *, warm_up: bool = False) -> Tensor:
        """The int64 rows, ``[H, K]``, of a token in the memory layer of this number.

        Those that ``warm_up`` a cache are others than those that are timed.
        """
        ...


class RecordedAccess:
    """What a model read, mapped to a table of another size.

    In a larger table each row's reads are shared by as many rows as there are more; which of them
    is read follows from the head's best row, as finer keys would follow from what is written. In a
    smaller table neighbours are one row.
    """

    def __init__(self, trace: AccessTrace, num_rows: int) -> None:
        self._rows_TMHK = torch.from_numpy(trace.rows_TMHK)
        self._num_recorded, self._num_rows = trace.counts_MR.shape[1], num_rows

    def rows(self, sequence: int, position: int, memory: int, *, warm_up: bool = False) -> Tensor:
        """Sequences begin evenly spread over half of what was recorded; the first half warms up."""
        half = len(self._rows_TMHK) // 2
        place = (sequence * _SPREAD + position) % half
        rows_HK = self._rows_TMHK[place if warm_up else half + place, memory]
        if self._num_rows <= self._num_recorded:
            return torch.floor_divide(rows_HK, self._num_recorded // self._num_rows)
        parts = self._num_rows // self._num_recorded
        # the high bits of a product with an odd number: evenly spread
        mixed_HK = ((rows_HK + rows_HK[:, :1] * _SPREAD) * _SPREAD) >> 32
        return torch.add(mixed_HK % parts, rows_HK, alpha=parts)


class DrawnAccess:
    """Rows drawn one by one: evenly, or the r-th most frequent with a share of 1 / r."""

    def __init__(self, num_rows: int, shape: tuple[int, int], is_zipf: bool) -> None:
        self._num_rows, self._shape = num_rows, shape
        self._generator = torch.Generator().manual_seed(0)
        self._sums_R: Tensor | None = None
        if is_zipf:
            self._sums_R = (1 / torch.arange(1, num_rows + 1, dtype=torch.float64)).cumsum(0)
            self._order_R = torch.randperm(num_rows, generator=self._generator)

    def rows(self, sequence: int, position: int, memory: int, *, warm_up: bool = False) -> Tensor:
        """Drawn anew at each call."""
        if self._sums_R is None:
            return torch.randint(self._num_rows, self._shape, generator=self._generator)
        drawn = torch.rand(self._shape, generator=self._generator, dtype=torch.float64)
        ranks_HK = torch.searchsorted(self._sums_R, drawn * self._sums_R[-1])
        return self._order_R[ranks_HK.clamp_(max=self._num_rows - 1)]
