"""Data-parallel training: processes that each compute a part of every batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from memory_ops.tables.trained import TableReads


class Replicas:
    """The processes of a run. All hold the same weights and moments, and apply the same steps.

    With one process, all methods are trivial. Several processes have joined a process group of
    torch.distributed, and must call the same methods in the same order.

    Attributes:
        rank: index of this process.
        count: number of processes.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        """``device`` holds the tensors that the process group exchanges."""
        self.rank, self.count = rank, count
        self._device = device

    @classmethod
    def of_group(cls, device: str) -> "Replicas":
        """The processes of the group that this process has joined."""
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            distributed.barrier()

    def sum_numbers(self, *values: float) -> list[float]:
        """Sum each value over all processes, in fp64."""
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
        maxima = torch.tensor(both, dtype=torch.float64, device=self._device)
        distributed.all_reduce(maxima, distributed.ReduceOp.MAX)
        return bool((maxima[: len(values)] == -maxima[len(values) :]).all())

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which pass them in the same order."""
        if self.count == 1:
            return
        pending = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for one in pending:
            one.wait()

    def gather(self, reads: TableReads) -> TableReads:
        """Concatenate the table reads of all processes: the sparse gradient of the whole batch."""
        if self.count == 1:
            return reads
        length = torch.tensor([len(reads.rows_THK)], device=reads.rows_THK.device)
        lengths = [torch.empty_like(length) for _ in range(self.count)]
        distributed.all_gather(lengths, length)
        counts = [int(length) for length in lengths]
        return TableReads(*(self._gather_one(part, counts) for part in reads))

    def _gather_one(self, part: Tensor, counts: Sequence[int]) -> Tensor:
        padded = part.new_zeros((max(counts), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([one[:count] for one, count in zip(parts, counts, strict=True)])
