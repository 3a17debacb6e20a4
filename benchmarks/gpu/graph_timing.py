"""Times GPU work without host launch overhead, by replaying CUDA graphs."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

# they take at least 1 ms, and displace what the caches hold
_FILLER_BYTES, _FILLER_COPIES = 2**28, 8


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
    filler = torch.empty(2, _FILLER_BYTES, dtype=torch.uint8, device="cuda")
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
