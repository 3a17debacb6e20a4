"""The engine's vocabulary: what is asked of it and what it answers, as plain data."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "error"]


class RequestError(ValueError):
    """The caller's mistake in a request. ``param`` names the field that is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    Raises:
        RequestError: a field is out of range.
    """

    max_tokens: int = field(default=16, metadata={"help": "tokens to generate at most"})
    temperature: float = field(
        default=1.0, metadata={"help": "divides the logits; 0 takes the likeliest token"}
    )
    top_k: int = field(
        default=0, metadata={"help": "sample among the k likeliest tokens; 0 or -1: all"}
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "sample among the fewest likeliest tokens that reach this probability"},
    )
    seed: int | None = field(
        default=None, metadata={"help": "same seed, same tokens (default: a random one)"}
    )
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = field(
        default=False, metadata={"help": "generate on after the end-of-sequence token"}
    )

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError("max_tokens", f"must be at least 1, not {self.max_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise RequestError("temperature", f"must be 0 or more, not {self.temperature}")
        if self.top_k < -1:
            raise RequestError("top_k", f"must be -1 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError("top_p", f"must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError("seed", f"{self.seed} does not fit in 64 bits")


@dataclass(frozen=True)
class RequestLimits:
    """What a loaded model can take; known to both processes, checked at the door."""

    vocab_size: int
    max_model_len: int

    def check(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Refuse a request that the engine could not run.

        Raises:
            RequestError: an empty prompt, an id outside the vocabulary, or too many tokens.
        """
        length = len(prompt_ids)
        if not length:
            raise RequestError("prompt", "is empty, there is nothing to continue")
        if length >= self.max_model_len:
            raise RequestError(
                "prompt",
                f"has {length} tokens, which leaves no room for an answer in the"
                f" {self.max_model_len} that the model takes",
            )
        if length + sampling.max_tokens > self.max_model_len:
            raise RequestError(
                "max_tokens",
                f"{sampling.max_tokens} and a prompt of {length} tokens exceed the"
                f" {self.max_model_len} that the model takes",
            )
        self._check_ids("prompt", prompt_ids)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(param, f"token id {wrong} is outside [0, {self.vocab_size})")


@dataclass(frozen=True)
class Request:
    """One prompt to be continued. ``request_id`` is unique among those under way."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class TokenOutput:
    """What one step gave one request.

    Attributes:
        request_id: whose tokens these are.
        token_ids: the new tokens, in order; empty when it ended without one.
        finish_reason: set once, in the request's last output.
        stop_token_id: the stop id that ended it, itself the last of ``token_ids``.
        error: what went wrong, when ``finish_reason`` is ``error``.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class EngineStatistics:
    """Gauges after a step. ``step_tokens`` counts the tokens that the step ran."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    step_tokens: int = 0


@dataclass(frozen=True)
class StepOutput:
    """Everything that one step tells the outside."""

    outputs: tuple[TokenOutput, ...]
    statistics: EngineStatistics
