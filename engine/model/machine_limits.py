"""Bandwidth and product rates of a machine, which bound the steps of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class MachineLimits:
    """Gigabytes read, and billions of additions and multiplications, a second.

    ``integer_gops`` are those of 8-bit integers; 0 if they were not measured.
    """

    gb_per_s: float
    gflops: float
    integer_gops: float = 0.0

    @classmethod
    def median(cls, measured: Sequence["MachineLimits"]) -> "MachineLimits":
        """The median of each, to go with medians of what was measured in between."""
        return cls(
            median(one.gb_per_s for one in measured),
            median(one.gflops for one in measured),
            median(one.integer_gops for one in measured),
        )
