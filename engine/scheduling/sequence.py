"""The state of an unfinished request: its tokens, its blocks and the number computed."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.model.row_patches import PatchSet
from engine.request import FinishReason, Request
from engine.sampling.choice import NO_TOKEN
from engine.sampling.masks import TokenMask
from engine.sampling.params import SamplingParams, TokenLogprobs
from engine.scheduling.step_plan import Drafter


class Ending(NamedTuple):
    """The number of chosen tokens that a sequence took, and why it ended, if it did."""

    num_taken: int
    reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    error_param: str | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """A request with its growing tokens.

    Keys and values of tokens ``[0, num_computed)`` are in ``block_ids``, or will be when the steps
    in flight have run; the first ``num_published`` blocks can be shared. The other tokens must
    still run. After ``token_ids`` come ``num_pending`` tokens that steps in flight choose.

    Attributes:
        seed: seed of its random numbers; each also depends on its position.
        turn: its place in the order of service; smaller comes first; no two are equal.
        seat: its number among the running sequences, -1 while it waits.
        num_in_flight: number of its chunks in flight.
        has_drafts_in_flight: whether one of them has drafts: so its length is not known.
        drafter: proposes its draft tokens; made for its first decode after it was admitted.
        hashes: prefix hashes of its full blocks, as far as they were needed.
        mask: restricts the tokens that it may generate, by a grammar for instance.
        patches: the request's row patches, in memory as long as a sequence or a step has them.
        prompt_scores: log-probabilities of prompt tokens that are not sent yet.
        scores_are_due: whether prompt log-probabilities were requested and are not sent yet.
        num_cached: prompt tokens found in the prefix cache when it first ran.
        arrived: monotonic time of its arrival; ``queued_s`` seconds later it first ran.
    """

    request: Request
    seed: int
    turn: tuple[int, int]
    mask: TokenMask | None = None
    patches: PatchSet = ()
    token_ids: list[int] = field(default_factory=list)
    num_pending: int = 0
    num_in_flight: int = 0
    has_drafts_in_flight: bool = False
    drafter: Drafter | None = None
    seat: int = -1
    num_computed: int = 0
    block_ids: tuple[int, ...] = ()
    num_published: int = 0
    hashes: list[bytes] = field(default_factory=list)
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    scores_are_due: bool = False
    num_cached: int | None = None
    arrived: float = field(default_factory=time.monotonic)
    queued_s: float = 0.0

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
    def length(self) -> int:
        """Number of its tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens without keys and values: 1 while decoding, more while the prompt runs."""
        return self.length - self.num_computed

    @property
    def num_generated(self) -> int:
        """Number of tokens that the engine chose and knows."""
        return len(self.token_ids) - self.prompt_length

    @property
    def can_run(self) -> bool:
        """Whether another step may run it before those in flight are settled.

        A mask or a rule about earlier tokens needs the pending token.
        """
        if not self.num_pending:
            return self.num_uncomputed > 0
        if self.has_drafts_in_flight:
            return False
        sampling = self.request.sampling
        is_last = self.num_generated + self.num_pending == sampling.max_tokens
        return not (is_last or self.mask is not None or sampling.needs_history)

    def start(self) -> None:
        """Record that it runs for the first time, after ``num_computed`` cached tokens."""
        self.num_cached = self.num_computed
        self.queued_s = time.monotonic() - self.arrived

    def append(self, chosen: Iterable[int], eos_ids: frozenset[int]) -> Ending:
        """Add tokens up to the one that ends the sequence."""
        sampling, count = self.request.sampling, 0
        for token_id in chosen:
            if token_id == NO_TOKEN:
                return Ending(count, "error", error=self._why_no_token(sampling))
            self.token_ids.append(token_id)
            count += 1
            is_eos = token_id in eos_ids and not sampling.ignore_eos
            if is_eos or token_id in sampling.stop_token_ids:
                return Ending(count, "stop", stop_token_id=token_id)
            if self.num_generated == sampling.max_tokens:
                return Ending(count, "length")
        return Ending(count)

    def _why_no_token(self, sampling: SamplingParams) -> str:
        not_finite = "the model's logits are not finite (NaN or infinity)"
        if self.mask is None and not sampling.has_rules_after(self.num_generated):
            return not_finite
        return f"penalties, bans and masks leave no token, or {not_finite}"
