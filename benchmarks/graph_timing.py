"""Times GPU work without host launch overhead, by replaying CUDA graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

_COPIED_BYTES = 2**28
# take at least 1 ms
_FILLER_COPIES = 8


@dataclass(frozen=True)
class CopyLimits:
    """GB/s of copies: within device memory (reads plus writes), and from host to device."""

    device: float
    bus: float

    @classmethod
    def measured(cls, rounds: int) -> "CopyLimits":
        """Measure both; the host memory is pinned."""
        data = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
        copy, pinned = torch.empty_like(data), torch.empty_like(data, device="cpu").pin_memory()
        device_us = replayed_us([lambda: copy.copy_(data)] * 8, rounds)
        bus_us = replayed_us([lambda: data.copy_(pinned, non_blocking=True)] * 2, rounds)
        return cls(2 * _COPIED_BYTES / device_us / 1e3, _COPIED_BYTES / bus_us / 1e3)


def replayed_us(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    refresh: Callable[[int], object] = lambda number: None,
) -> float:
    """Microseconds per call: captures all calls in one CUDA graph, returns the median replay.

    Before each replay, ``refresh`` gets the replay's number, from 0; replay 0 is the warm-up.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles the kernels that it launches
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    filler = torch.empty(2, _COPIED_BYTES, dtype=torch.uint8, device="cuda")
    taken: list[float] = []
    for number in range(rounds + 1):
        refresh(number)
        for _ in range(_FILLER_COPIES):
            # keep the device busy until the host has launched the replay
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
