"""The GPU as the executor uses it: one queue of work, events, graphs; tests substitute a fake."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from engine.executors.batch import DeviceLostError
from engine.executors.cuda.graph_pieces import GraphPieces
from memory_ops.tables.host_calls import Cut

logger = logging.getLogger(__name__)
Work = Callable[[], None]


class DeviceEvent(Protocol):
    """A point in the queue of a device."""

    def wait(self) -> None:
        """Block the host until the device has done the work before this point.

        Raises:
            DeviceLostError: the device failed.
        """
        ...


class Device(Protocol):
    """A queue of work that runs in order, while the host goes on.

    Attributes:
        torch_device: the device of its tensors.
        num_processors: number of kernels' programs that it runs at the same time, roughly.
    """

    torch_device: torch.device
    num_processors: int

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies to and from while the host goes on."""
        ...

    def queue(self, work: Work) -> None:
        """Queue the kernels and copies that ``work`` launches. The host must not change pinned
        memory that they read, or read what they write, before an event behind them is over.

        Raises:
            DeviceLostError: the device failed.
        """
        ...

    def record(self) -> DeviceEvent:
        """An event behind all work queued so far."""
        ...

    def synchronize(self) -> None:
        """Wait until tensors that were made outside of the queue are written."""
        ...

    def memory_bytes(self) -> int:
        """Bytes of its memory that this process holds, with what is kept for reuse."""
        ...

    def capture(self, work: Callable[[Cut], None]) -> Work:
        """Record the kernels that ``work`` launches, without running them, in a graph.

        ``work`` has run before. It gets a function that cuts the graph: each replay calls the
        argument of this function on the host, after the kernels before the cut are launched and
        before those behind it are.

        Returns the replay, to be queued. All graphs share one pool of memory, so a replay
        overwrites what other replays computed.
        """
        ...


class CudaDevice:
    """An NVIDIA or AMD GPU, through torch."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # what else this thread queues, such as reads of counters, is ordered with the steps
        torch.cuda.set_stream(self._stream)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            self._check_alive(error)
            raise

    def queue(self, work: Work) -> None:
        try:
            with self._current():
                work()
        except Exception as error:
            self._check_alive(error)
            raise

    def record(self) -> "CudaEvent":
        try:
            return CudaEvent(self._stream.record_event())
        except RuntimeError as error:
            self._check_alive(error)
            raise

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def memory_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.torch_device)

    def capture(self, work: Callable[[Cut], None]) -> Work:
        pieces = GraphPieces(self._pool, self._stream)
        with self._current(), pieces.captured():
            work(pieces.cut)
        return pieces.replay

    def _current(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)

    def _check_alive(self, error: Exception) -> None:
        """Raise DeviceLostError if no work can run any more."""
        try:
            self._stream.synchronize()
        except RuntimeError as lost:
            raise DeviceLostError(str(lost)) from error


class CudaEvent:
    """An event of a CUDA stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(str(error)) from error
