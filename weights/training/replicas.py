"""Data-parallel training: processes that each compute a part of every batch."""

import contextlib
import hashlib
import math
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from memory_ops.tables.trained import TableReads
from weights.errors import TrainingError

# in a step a process that does not answer is dead; collective calls end after this time
STEP_TIMEOUT = timedelta(minutes=30)
# one process tokenises and writes checkpoints while the others wait, however long it takes
_PATIENT_TIMEOUT = timedelta(days=30)


class Replicas:
    """The processes of a run. All apply the same steps to the weights that they hold.

    With one process, all methods are trivial. Several processes have joined a process group of
    torch.distributed, and must call the same methods in the same order. All methods raise
    TrainingError if another process has ended, or does not answer in time.

    Attributes:
        rank: index of this process.
        count: number of processes.
        local_count: number of processes on this machine, which share its memory.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        device: str = "cpu",
        *,
        local_count: int | None = None,
        patient_group: distributed.ProcessGroup | None = None,
    ) -> None:
        """``device`` holds the tensors that the process group exchanges.

        ``patient_group`` makes the calls that wait for one process's long work, on the CPU.
        """
        self.rank, self.count = rank, count
        self.local_count = count if local_count is None else local_count
        self._device = device
        self._patient_group = patient_group

    @classmethod
    def of_group(cls, device: str) -> "Replicas":
        """The processes of the group that this process has joined."""
        rank, count = distributed.get_rank(), distributed.get_world_size()
        patient_group = distributed.new_group(timeout=_PATIENT_TIMEOUT, backend="gloo")
        machine = torch.tensor([_machine_number()])
        machines = [torch.empty_like(machine) for _ in range(count)]
        distributed.all_gather(machines, machine, patient_group)
        local_count = sum(bool(one == machine) for one in machines)
        return cls(rank, count, device, local_count=local_count, patient_group=patient_group)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have called this, however long one of them works."""
        self.any_of(False)

    def any_of(self, flag: bool) -> bool:
        """Whether the flag of any process is set; waits as ``wait``."""
        if self.count == 1:
            return flag
        flags = torch.tensor([int(flag)])
        self.reduce(flags, distributed.ReduceOp.MAX, is_patient=True)
        return bool(flags)

    def first_text(self, text: str) -> str:
        """The text of the first process, on every process; waits as ``wait``."""
        if self.count == 1:
            return text
        content = text.encode()
        length = torch.tensor([len(content)])
        self.broadcast(length)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            data.copy_(torch.tensor(list(content), dtype=torch.uint8))
        self.broadcast(data)
        return bytes(data.tolist()).decode()

    def sum_numbers(self, *values: float) -> list[float]:
        """Sum each value over all processes, in fp64."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        self.reduce(sums, distributed.ReduceOp.SUM)
        return [float(value) for value in sums]

    def agree(self, *values: float) -> bool:
        """Whether all processes have the same values."""
        if self.count == 1:
            return True
        both = [*values, *(-value for value in values)]
        maxima = torch.tensor(both, dtype=torch.float64, device=self._device)
        self.reduce(maxima, distributed.ReduceOp.MAX)
        return bool((maxima[: len(values)] == -maxima[len(values) :]).all())

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which pass them in the same order."""
        if self.count == 1:
            return
        self.sum_all(tensors)

    def gather(self, reads: TableReads) -> TableReads:
        """Concatenate the table reads of all processes: the sparse gradient of the whole batch."""
        if self.count == 1:
            return reads
        return TableReads(*(torch.cat(self.gather_parts(part)) for part in reads))

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """The parts of all processes, which may differ in length; see ``Exchange``."""
        counts = self.swap_counts([len(part)] * self.count)
        if not max(counts):
            return [part] * self.count
        padded = part.new_zeros((max(counts), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        self.all_gather(parts, padded)
        return [one[:count] for one, count in zip(parts, counts, strict=True)]

    def swap_counts(self, counts: Sequence[int]) -> list[int]:
        """Send a count to each process and receive one from each; see ``Exchange``."""
        sent = torch.tensor(counts, device=self._device)
        received: list[int] = torch.stack(self.swap(list(sent), [()] * self.count)).tolist()
        return received

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send a tensor to each process and receive one from each; see ``Exchange``."""
        dtype = parts[0].dtype
        sent = [_bytes_of(part) for part in parts]
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        received = sent[0].new_empty(sum(sizes))
        self.swap_bytes(received, torch.cat(sent), sizes, [len(one) for one in sent])
        arrived = zip(torch.split(received, sizes), shapes, strict=True)
        return [one.view(dtype).view(shape) for one, shape in arrived]

    # the calls of torch.distributed, which tests replace

    def reduce(
        self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType, *, is_patient: bool = False
    ) -> None:
        """Replace a tensor by the sums or maxima over all processes."""
        with _naming_lost_process():
            distributed.all_reduce(tensor, operation, self._patient_group if is_patient else None)

    def sum_all(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum over all processes, all at the same time."""
        with _naming_lost_process():
            pending = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
            for one in pending:
                one.wait()

    def all_gather(self, parts: list[Tensor], part: Tensor) -> None:
        """Fill ``parts`` with the parts of all processes, which have one shape."""
        with _naming_lost_process():
            distributed.all_gather(parts, part)

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor on the CPU by that of the first process."""
        with _naming_lost_process():
            distributed.broadcast(tensor, 0, self._patient_group)

    def swap_bytes(
        self, received: Tensor, sent: Tensor, sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Fill ``received`` with what the processes send, by the bytes to and from each."""
        with _naming_lost_process():
            distributed.all_to_all_single(received, sent, sizes, sent_sizes)


@contextlib.contextmanager
def _naming_lost_process() -> Iterator[None]:
    """Raise TrainingError if a collective call fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"a process of the run has ended, or does not answer ({reason}); when all have ended,"
            " continue with --resume"
        ) from None


def _machine_number() -> int:
    """A number that is the same for processes of one machine, or of one container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
