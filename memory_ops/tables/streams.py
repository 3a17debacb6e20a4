"""Two streams of a device and the order between them, behind what a test can put in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Stream(Protocol):
    """Work that a device does in the order in which it was given, beside that of other streams."""

    def record(self) -> Any:
        """An event: all that the stream was given so far is done."""
        ...

    def wait(self, event: Any) -> None:
        """Have what the stream is given from now on follow an event. Returns at once."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Give the stream what ``work`` launches. Returns at once."""
        ...

    def keep(self, tensor: Tensor) -> None:
        """Should the tensor be forgotten, its memory goes to nobody before this stream has done
        what it was given until then."""
        ...


class StreamPair(NamedTuple):
    """The stream that is current whenever ``caller`` is called, and one ``beside`` it."""

    caller: Callable[[], Stream]
    beside: Stream


@dataclass(frozen=True)
class CudaStream:
    """A stream of CUDA's."""

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


def cuda_streams(device: torch.device) -> StreamPair:
    """The current stream of a GPU, and a new one."""
    return StreamPair(
        lambda: CudaStream(torch.cuda.current_stream(device)),
        CudaStream(torch.cuda.Stream(device)),  # type: ignore[no-untyped-call]
    )
