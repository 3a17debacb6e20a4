"""Protocol of the collective calls by which processes read and train a table that they share."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """A group of processes. All must make the same calls in the same order.

    Attributes:
        rank: index of this process.
        count: number of processes.
    """

    rank: int
    count: int

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send ``parts[p]`` to process p; return what each process sent to this one.

        All tensors of a call have one dtype. ``shapes[p]`` is the shape that process p sends.
        """

    def swap_counts(self, counts: Sequence[int]) -> list[int]:
        """Send ``counts[p]`` to process p; return the count that each process sent."""

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """The parts of all processes, which may differ in length, on every process."""

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
