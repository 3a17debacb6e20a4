"""Scalings of rotary frequencies for contexts longer than in training, as plain data."""

import math
from dataclasses import dataclass

from engine.model.checks import check_positive


@dataclass(frozen=True)
class LinearScaling:
    """All wavelengths are multiplied by ``factor`` (arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        check_positive(self, "factor")


@dataclass(frozen=True)
class Llama3Scaling:
    """The scaling of Llama 3.1.

    Wavelengths above ``original_max_position / low_freq_factor`` are multiplied by ``factor``,
    those below ``original_max_position / high_freq_factor`` are unchanged, others interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        check_positive(self, "factor", "low_freq_factor", "original_max_position")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor: must be greater than low_freq_factor")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071).

    Lanes that turn more than ``beta_fast`` times within ``original_max_position`` positions are
    unchanged, wavelengths of those that turn less than ``beta_slow`` times are multiplied by
    ``factor``, others are interpolated. With ``truncate`` both limits are whole lanes. Queries and
    keys are multiplied by ``attention_factor``, by default 0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "factor", "original_max_position", "beta_fast", "beta_slow")
        if self.attention_factor is not None:
            check_positive(self, "attention_factor")

    @property
    def amplitude(self) -> float:
        """The factor of queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
