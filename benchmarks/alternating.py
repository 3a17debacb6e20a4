"""Times of things that are compared: by turns, on fresh inputs, and their medians."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """Something that takes time.

    Attributes:
        name: who it is.
        call: what is timed.
        inputs: the arguments of that many calls, no two alike, drawn outside the timing.
        calls: how many calls make a turn, long enough for the clock.
    """

    name: str
    call: Callable[..., object]
    inputs: Callable[[int], Sequence[tuple[Any, ...]]]
    calls: int


def median_seconds(contestants: Sequence[Contestant], rounds: int) -> list[float]:
    """Each one's seconds a call: the median of ``rounds`` turns, after one to warm up."""
    turns: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds + 1):
        for contestant, seconds in zip(contestants, turns, strict=True):
            taken = _turn(contestant)
            if number:
                seconds.append(taken)
    return [median(seconds) for seconds in turns]


def _turn(contestant: Contestant) -> float:
    inputs = contestant.inputs(contestant.calls)
    call = contestant.call
    gc.disable()
    start = time.perf_counter()
    for arguments in inputs:
        call(*arguments)
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds / len(inputs)
