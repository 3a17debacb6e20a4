"""A pair of CUDA streams with explicit ordering; tests substitute fakes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether all work before this point has completed. Does not block the host."""
        ...

    def synchronize(self) -> None:
        """Block the host until all work before this point has completed."""
        ...


class Stream(Protocol):
    """A queue of device work that runs in order, concurrently with other streams."""

    def record(self) -> Event:
        """An event that completes when all work queued so far has completed."""
        ...

    def wait(self, event: Any) -> None:
        """Make work queued from now on wait for ``event``. Does not block the host."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Queue the kernels that ``work`` launches. Does not block the host."""
        ...

    def keep(self, tensor: Tensor) -> None:
        """Keep a freed tensor's memory from being reused until this stream has finished the work
        that was queued before the free."""
        ...

    def is_idle(self) -> bool:
        """Whether all work queued so far has completed. Does not block the host."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until all work queued so far has completed."""
        ...


class StreamPair(NamedTuple):
    """The caller's stream, which is the current one at each call, and a side stream."""

    caller: Callable[[], Stream]
    side: Stream


@dataclass(frozen=True)
class CudaStream:
    """A CUDA stream."""

    stream: torch.cuda.Stream

    def record(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self.stream.record_event()
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self.stream.wait_event(event)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(self.stream)

    def is_idle(self) -> bool:
        return self.stream.query()

    def synchronize(self) -> None:
        self.stream.synchronize()


def current_stream(device: torch.device) -> StreamPair:
    """The current stream of a GPU, also as the side stream."""
    stream = CudaStream(torch.cuda.current_stream(device))
    return StreamPair(lambda: stream, stream)


def cuda_streams(device: torch.device) -> StreamPair:
    """The current stream of a GPU, and a new side stream."""
    return StreamPair(
        lambda: CudaStream(torch.cuda.current_stream(device)),
        CudaStream(torch.cuda.Stream(device)),  # type: ignore[no-untyped-call]
    )
