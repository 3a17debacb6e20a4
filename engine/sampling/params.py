"""Sampling parameters of one request, and the log-probabilities that they ask for."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

from engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_LISTED_IDS = 1024
MAX_TEMPERATURE = 100.0
T = TypeVar("T")


def option(default: T, help: str, **metadata: object) -> T:
    """A dataclass field that is an option of the command line, with its default and help."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request; RequestError if a field is out of range.

    They apply in this order: repetition, presence and frequency penalties, logit_bias, allowed and
    bad tokens and min_tokens, temperature, top_k, top_p, min_p.

    Attributes:
        stop_token_ids: ids that end the answer and are its last token.
        logit_bias: (token id, number added to its logit).
        allowed_token_ids: the only ids that can be chosen; None allows all.
        bad_words: sequences of ids whose last id is not chosen after the ids before it.
        logprobs: number of likeliest tokens whose log-probabilities come with each chosen token's,
            by the model's softmax before any of the above; None returns none at all.
        prompt_logprobs: the same for all prompt tokens but the first.
        memory_trace: return the rows that memory layers read to choose each token.
    """

    max_tokens: int = option(
        16,
        "generate at most this many tokens",
        group=("sampling", "--max-tokens 64 --temperature 0.7 --top-p 0.9"),
    )
    min_tokens: int = option(0, "generate at least this many tokens")
    temperature: float = option(1.0, "divide logits by this; 0 takes the likeliest token")
    top_k: int = option(0, "sample from the k likeliest tokens; 0 or -1: all")
    top_p: float = option(
        1.0, "sample from the likeliest tokens that together reach this probability"
    )
    min_p: float = option(0.0, "least probability, as a fraction of the likeliest token's")
    repetition_penalty: float = option(1.0, "above 1 makes all tokens so far less likely")
    presence_penalty: float = option(0.0, "subtract this from the logits of generated tokens")
    frequency_penalty: float = option(0.0, "subtract this once per occurrence of a generated token")
    seed: int | None = option(None, "sampling seed (default: random)")
    ignore_eos: bool = option(False, "continue after end of sequence")
    stop_token_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: frozenset[int] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    memory_trace: bool = False

    def __post_init__(self) -> None:
        for param, message in self._mistakes():
            raise RequestError(param, message)

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0)

    @cached_property
    def needs_history(self) -> bool:
        """Whether choosing a token needs the tokens before it."""
        return self.has_penalties or bool(self.bad_words)

    def has_rules_after(self, num_generated: int) -> bool:
        """Whether logit rules apply to the token after ``num_generated`` tokens."""
        return num_generated < self.min_tokens or self._has_lasting_rules

    @cached_property
    def _has_lasting_rules(self) -> bool:
        return bool(self.needs_history or self.logit_bias or self.allowed_token_ids is not None)

    @property
    def listed_ids(self) -> dict[str, set[int]]:
        """All token ids in lists of the request, by field."""
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
            yield "max_tokens", "must be 1 or more unless prompt_logprobs is set, not 0"
        if not 0 <= self.min_tokens <= self.max_tokens:
            yield "min_tokens", f"must be 0 to max_tokens, not {self.min_tokens}"
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            yield "temperature", f"must be 0 to {MAX_TEMPERATURE:g}, not {self.temperature}"
        if self.top_k < -1:
            yield "top_k", f"must be -1 or more, not {self.top_k}"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"must be above 0 and at most 1, not {self.top_p}"
        ranges = {"min_p": (0, 1), "repetition_penalty": (0.01, 100)}
        ranges |= {"presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
        for param, (least, most) in ranges.items():
            if not least <= getattr(self, param) <= most:
                yield param, f"must be {least} to {most}, not {getattr(self, param)}"
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
                yield "allowed_token_ids", "bad_words exclude all of them; allow another token"
        if any(not word for word in self.bad_words):
            yield "bad_words", "must not contain an empty word"
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
        token_id: the token at this position; ``logprob`` is its log-probability.
        rank: its rank among all tokens, 1 for the likeliest.
        top: (token id, log-probability) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]
