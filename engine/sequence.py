"""One request under way: its tokens, its blocks and how far they are computed."""

from dataclasses import dataclass, field

from engine.request import Request


@dataclass
class Sequence:
    """A request with its growing tokens.

    Tokens ``[0, num_computed)`` have their keys and values in ``block_ids``; tokens
    ``[num_computed, len(token_ids))`` are still to be run. The last one to be run gives the next.
    """

    request: Request
    seed: int
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens without keys and values: 1 while decoding, more while the prompt is run."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens that this engine chose."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and longest answer together."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens
