"""Sampling parameters of one request, and the log-probabilities that they ask for."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_LISTED_IDS = 1024
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    The logits are changed in this order: repetition, presence and frequency penalties, logit_bias,
    what is allowed or bad or too early, temperature; of the softmax then top_k, top_p and min_p
    leave a part.

    Attributes:
        stop_token_ids: ids that end the answer, the last of it.
        logit_bias: (token id, number added to its logit).
        allowed_token_ids: only these can come; ``None`` allows all.
        bad_words: sequences of ids whose last id cannot come after those before it.
        logprobs: how many likeliest tokens' log-probabilities come with each chosen token's own;
            ``None`` for none at all. They are those of the model, before any of the above.
        prompt_logprobs: the same for the tokens of the prompt but its first.

    Raises:
        RequestError: a field is out of range.
    """

    max_tokens: int = field(
        default=16,
        metadata={
            "help": "generate at most this many tokens",
            "group": ("sampling", "--max-tokens 64 --temperature 0.7 --top-p 0.9"),
        },
    )
    min_tokens: int = field(default=0, metadata={"help": "generate at least this many tokens"})
    temperature: float = field(
        default=1.0, metadata={"help": "divide logits by this; 0 takes the likeliest token"}
    )
    top_k: int = field(
        default=0, metadata={"help": "sample from the k likeliest tokens; 0 or -1: all"}
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "sample from the likeliest tokens that together reach this probability"},
    )
    min_p: float = field(
        default=0.0, metadata={"help": "least probability, as a fraction of the likeliest token's"}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1 makes all tokens so far less likely"}
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "subtract this from the logits of generated tokens"}
    )
    frequency_penalty: float = field(
        default=0.0, metadata={"help": "subtract this once per occurrence of a generated token"}
    )
    seed: int | None = field(default=None, metadata={"help": "sampling seed (default: random)"})
    ignore_eos: bool = field(default=False, metadata={"help": "continue after end of sequence"})
    stop_token_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: frozenset[int] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for param, message in self._mistakes():
            raise RequestError(param, message)

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @cached_property
    def needs_history(self) -> bool:
        """Whether choosing a token takes the tokens before it."""
        return self.has_penalties or bool(self.bad_words)

    def has_rules_after(self, num_generated: int) -> bool:
        """Whether anything may change the logits of the token after so many."""
        return num_generated < self.min_tokens or self._has_lasting_rules

    @cached_property
    def _has_lasting_rules(self) -> bool:
        return bool(self.needs_history or self.logit_bias or self.allowed_token_ids is not None)

    @property
    def listed_ids(self) -> dict[str, set[int]]:
        """Every token id that a field names, by field."""
        return {
            "stop_token_ids": set(self.stop_token_ids),
            "logit_bias": {token_id for token_id, _ in self.logit_bias},
            "allowed_token_ids": set(self.allowed_token_ids or ()),
            "bad_words": {token_id for word in self.bad_words for token_id in word},
        }

    def _mistakes(self) -> Iterator[tuple[str, str]]:
        if self.max_tokens < 0:
            yield "max_tokens", f"must be 0 or more, not {self.max_tokens}"
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            yield "max_tokens", "0 goes with log-probabilities of the prompt alone"
        if not 0 <= self.min_tokens <= self.max_tokens:
            yield "min_tokens", f"must be 0 to max_tokens, not {self.min_tokens}"
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            yield "temperature", f"must be 0 to {MAX_TEMPERATURE:g}, not {self.temperature}"
        if self.top_k < -1:
            yield "top_k", f"must be -1 or more, not {self.top_k}"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"must be above 0 and at most 1, not {self.top_p}"
        if not 0 <= self.min_p <= 1:
            yield "min_p", f"must be 0 to 1, not {self.min_p}"
        if not 0.01 <= self.repetition_penalty <= 100:
            yield "repetition_penalty", f"must be 0.01 to 100, not {self.repetition_penalty}"
        for param in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, param) <= 2:
                yield param, f"must be -2 to 2, not {getattr(self, param)}"
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            yield "seed", f"{self.seed} does not fit in 64 bits"
        yield from self._mistakes_in_lists()

    def _mistakes_in_lists(self) -> Iterator[tuple[str, str]]:
        for token_id, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                yield "logit_bias", f"must be -100 to 100, not {bias} for token id {token_id}"
        if self.allowed_token_ids is not None:
            banned = {word[0] for word in self.bad_words if len(word) == 1}
            if not self.allowed_token_ids - banned:
                yield "allowed_token_ids", "leaves no token that could come"
        if any(not word for word in self.bad_words):
            yield "bad_words", "an empty one is in every text"
        for param, ids in self.listed_ids.items():
            if len(ids) > MAX_LISTED_IDS:
                yield param, f"at most {MAX_LISTED_IDS} token ids, not {len(ids)}"
        for param in ("logprobs", "prompt_logprobs"):
            count = getattr(self, param)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                yield param, f"must be 0 to {MAX_LOGPROBS}, not {count}"


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, by the model's own softmax.

    Attributes:
        token_id: the token that stands there.
        logprob: its log-probability.
        rank: its place among all tokens, 1 for the likeliest.
        top: the likeliest tokens with theirs, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]
