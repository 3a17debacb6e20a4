"""The protocol by which tokens are guessed ahead, to be checked in one step."""

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses that cost time when they are wrong, never correctness."""

    def draft(self, token_ids: Sequence[int], count: int) -> Sequence[int]:
        """Guess up to ``count`` tokens that follow these; fewer, or none, are as good."""
        ...
