"""Times of what a GPU does, without those of the host that tells it to: replays of CUDA graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

_COPIED_BYTES = 2**28
# a millisecond or more
_FILLING_COPIES = 8


@dataclass(frozen=True)
class CopyLimits:
    """GB/s of copies: within the device's memory, read and written, and from the host."""

    device: float
    bus: float

    @classmethod
    def measured(cls, rounds: int) -> "CopyLimits":
        """Measure them; the host's memory is page-locked."""
        there = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
        other, locked = torch.empty_like(there), torch.empty_like(there, device="cpu").pin_memory()
        within = replayed_us([lambda: other.copy_(there)] * 8, rounds)
        across = replayed_us([lambda: there.copy_(locked, non_blocking=True)] * 2, rounds)
        return cls(2 * _COPIED_BYTES / within / 1e3, _COPIED_BYTES / across / 1e3)


def replayed_us(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    refresh: Callable[[int], object] = lambda number: None,
) -> float:
    """Microseconds a call, of a graph that makes them all: the median of some replays.

    ``refresh`` is called before each with its number, from 0; the first replay only warms up.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles what it launches
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    filler = torch.empty(2, _COPIED_BYTES, dtype=torch.uint8, device="cuda")
    taken: list[float] = []
    for number in range(rounds + 1):
        refresh(number)
        for _ in range(_FILLING_COPIES):
            # the device is busy until the host has launched all the rest
            filler[0].copy_(filler[1])
        begin, end = _event(), _event()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return median(taken[1:])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
