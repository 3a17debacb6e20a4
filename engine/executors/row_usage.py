"""Counts how often each row of a value table is read, and summarises the counts."""

import torch
from torch import Tensor

from engine.request import RowUsageSummary

# all counts are halved when a table has this many reads, so that no int32 overflows
_MOST_READS = 2**30
_NUM_MOST_READ = 20


class RowUsage:
    """Reads of each row of one table; recent ones weigh more after 2^30 reads.

    One thread adds, others may summarise meanwhile.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        """Reserve 4 bytes per row on ``device``; on a CPU only rows that are read take memory."""
        self._counts_R = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._one = torch.ones((), dtype=torch.int32, device=device)
        self._num_reads = 0

    def add(self, rows: Tensor) -> None:
        """Count int64 row ids, on the device of this object."""
        rows = rows.flatten()
        self._counts_R.index_add_(0, rows, self._one.expand(len(rows)))
        self._num_reads += len(rows)
        if self._num_reads >= _MOST_READS:
            self._counts_R //= 2
            self._num_reads //= 2

    @torch.inference_mode()
    def summary(self) -> RowUsageSummary:
        """The most-read rows, and the number of rows by reads."""
        read_R = self._counts_R.nonzero().flatten()
        counts = self._counts_R[read_R]
        top = counts.topk(min(_NUM_MOST_READ, len(counts)))
        # bucket i holds counts in [2^i, 2^(i + 1))
        buckets = counts.double().log2().floor().long().bincount().tolist() if len(counts) else []
        return RowUsageSummary(
            num_reads=self._num_reads,
            most_read=tuple(zip(read_R[top.indices].tolist(), top.values.tolist(), strict=True)),
            histogram=tuple((2**i, rows) for i, rows in enumerate(buckets)),
        )
