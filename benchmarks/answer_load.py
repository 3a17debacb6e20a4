"""The load of benchmarks that compare two ways to generate answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError


@dataclass(frozen=True)
class AnswerLoad:
    """Numbers of requests, answer tokens and rounds, and the file for the results.

    Attributes:
        batches: numbers of requests that decode together.
        tokens: answer tokens per request, at most.
    """

    batches: Sequence[int]
    tokens: int
    rounds: int
    json_file: Path | None

    def check(self, least_tokens: int) -> None:
        """Raise ConfigError if a number is out of range."""
        for name, least, value in (
            ("batches", 1, min(self.batches)),
            ("rounds", 1, self.rounds),
            ("tokens", least_tokens, self.tokens),
        ):
            if value < least:
                raise ConfigError(f"{name}: must be at least {least}, not {value}")
