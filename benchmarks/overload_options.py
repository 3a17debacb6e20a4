"""Options of ``memplus bench overload``; needs no torch."""

import math
from dataclasses import dataclass, field

from engine.errors import ConfigError


@dataclass(frozen=True)
class OverloadOptions:
    """The load; every field becomes an option.

    Raises:
        ConfigError: a field is out of range.
    """

    input_len: int = field(default=32, metadata={"help": "words per prompt"})
    output_len: int = field(default=64, metadata={"help": "tokens to generate per request"})
    factor: float = field(
        default=10.0, metadata={"help": "requests sent, as a multiple of those that can be served"}
    )
    max_queued_requests: int = field(
        default=256, metadata={"help": "answers that may wait in the server"}
    )
    window_s: float = field(default=30.0, metadata={"help": "time of each measurement"})
    ramp_s: float = field(default=5.0, metadata={"help": "time before each measurement"})
    seed: int = field(default=22, metadata={"help": "seed of the prompts"})

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "max_queued_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")
        for name in ("factor", "window_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: must be greater than 0, not {getattr(self, name)}")
        if not 0 <= self.ramp_s < math.inf:
            raise ConfigError(f"ramp_s: must be 0 or more, not {self.ramp_s}")
