"""One request under way: its tokens, its blocks and how far they are computed."""

from dataclasses import dataclass, field

from engine.request import Request, TokenLogprobs
from engine.token_mask import TokenMask


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
