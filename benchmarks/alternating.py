"""Interleaved timing of alternatives on fresh inputs; reports medians."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """One of the alternatives that are timed against each other.

    Attributes:
        name: the alternative's name in the results.
        call: the timed function.
        inputs: makes the arguments of that many calls, all different; this is not timed.
        calls: calls per measurement, enough for the clock's resolution.
    """

    name: str
    call: Callable[..., object]
    inputs: Callable[[int], Sequence[tuple[Any, ...]]]
    calls: int


def median_seconds(contestants: Sequence[Contestant], rounds: int) -> list[float]:
    """Seconds per call of each contestant: the median of ``rounds`` rounds after one warm-up."""
    measured: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds + 1):
        for contestant, seconds in zip(contestants, measured, strict=True):
            taken = _seconds_per_call(contestant)
            if number:
                seconds.append(taken)
    return [median(seconds) for seconds in measured]


def _seconds_per_call(contestant: Contestant) -> float:
    inputs = contestant.inputs(contestant.calls)
    call = contestant.call
    gc.disable()
    start = time.perf_counter()
    for arguments in inputs:
        call(*arguments)
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds / len(inputs)
