"""Processes that train one model together, each on its part of every batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from memory_ops.tables.trained import TableReads


class Replicas:
    """All hold the same weights and moments, and change them alike.

    A process that is alone is the first of one, for whom nothing here costs anything. All others
    have joined a process group of torch.distributed, and call the same methods in the same order.

    Attributes:
        rank: of this process.
        count: of them all.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        """``device`` is where their group exchanges numbers."""
        self.rank, self.count = rank, count
        self._device = device

    @classmethod
    def of_group(cls, device: str) -> "Replicas":
        """Those of the process group that this process has joined."""
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come as far."""
        if self.count > 1:
            distributed.barrier()

    def sum_numbers(self, *values: float) -> list[float]:
        """The sums of all processes' values, fp64."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def agree(self, *values: float) -> bool:
        """Whether all processes have the same values."""
        if self.count == 1:
            return True
        both = [*values, *(-value for value in values)]
        most = torch.tensor(both, dtype=torch.float64, device=self._device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return bool((most[: len(values)] == -most[len(values) :]).all())

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the sum of all processes' own; all have the same ones, in this order."""
        if self.count == 1:
            return
        under_way = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for one in under_way:
            one.wait()

    def gather(self, reads: TableReads) -> TableReads:
        """The reads of all processes, in their order: a table's gradient, as sparse as it is."""
        if self.count == 1:
            return reads
        own = torch.tensor([len(reads.rows_THK)], device=reads.rows_THK.device)
        lengths = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(lengths, own)
        counts = [int(length) for length in lengths]
        return TableReads(*(self._gather_one(part, counts) for part in reads))

    def _gather_one(self, part: Tensor, counts: Sequence[int]) -> Tensor:
        padded = part.new_zeros((max(counts), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([one[:count] for one, count in zip(parts, counts, strict=True)])
