"""One request under way: its tokens, its blocks and how far they are computed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.request import FinishReason, Request
from engine.sampling.choice import NO_TOKEN
from engine.sampling.masks import TokenMask
from engine.sampling.params import TokenLogprobs


class Ending(NamedTuple):
    """How many of the chosen tokens a sequence took, and how it ended with them, if it did."""

    num_taken: int
    reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """A request with its growing tokens.

    Tokens ``[0, num_computed)`` have their keys and values in ``block_ids``, of which the first
    ``num_published`` can be found by others; tokens ``[num_computed, len(token_ids))`` are still
    to be run. The last one to be run gives the next.

    Attributes:
        seed: from which with the position its random numbers follow.
        turn: its place in the order of service; smaller comes first.
        hashes: of its full blocks, as far as they were needed.
        mask: what it may generate, where that is bound to a grammar or the like.
        prompt_scores: log-probabilities of prompt tokens, while they are gathered.
        scores_are_due: whether they were asked for and are not sent yet.
        num_cached: prompt tokens found computed when it first ran.
    """

    request: Request
    seed: int
    turn: tuple[int, int]
    mask: TokenMask | None = None
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    hashes: list[bytes] = field(default_factory=list)
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    scores_are_due: bool = False
    num_cached: int | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.scores_are_due = self.request.sampling.prompt_logprobs is not None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens without keys and values: 1 while decoding, more while the prompt is run."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens that this engine chose."""
        return len(self.token_ids) - self.prompt_length

    def append(self, chosen: Iterable[int], eos_ids: frozenset[int]) -> Ending:
        """Add tokens up to the one that ends the sequence, and say how that came."""
        sampling, count = self.request.sampling, 0
        for token_id in chosen:
            if token_id == NO_TOKEN:
                return Ending(count, "error", error="no token is left that could come")
            self.token_ids.append(token_id)
            count += 1
            is_eos = token_id in eos_ids and not sampling.ignore_eos
            if is_eos or token_id in sampling.stop_token_ids:
                return Ending(count, "stop", stop_token_id=token_id)
            if self.num_generated == sampling.max_tokens:
                return Ending(count, "length")
        return Ending(count)
