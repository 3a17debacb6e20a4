"""The engine's vocabulary: what is asked of it and what it answers, as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from engine.errors import RequestError
from engine.sampling.params import SamplingParams, TokenLogprobs
from memory_ops.tables.table_statistics import TableStatistics

FinishReason = Literal["stop", "length", "error"]
MAX_PRIORITY = 100


@dataclass(frozen=True)
class RequestLimits:
    """What a loaded model can take; known to both processes, checked at the door."""

    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int] = frozenset()

    def check(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Refuse a request that the engine could not run.

        Raises:
            RequestError: an empty prompt, an id outside the vocabulary, or too many tokens.
        """
        length = len(prompt_ids)
        if not length:
            raise RequestError("prompt", "is empty, there is nothing to continue")
        if length > self.max_model_len - (sampling.max_tokens > 0):
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
        for param, ids in {"prompt": prompt_ids, **sampling.listed_ids}.items():
            wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
            if wrong is not None:
                raise RequestError(param, f"token id {wrong} is outside [0, {self.vocab_size})")
        allowed, ends = sampling.allowed_token_ids, sampling.stop_token_ids | self.eos_ids
        if sampling.min_tokens and allowed is not None and allowed <= ends:
            message = "are all ends, which min_tokens forbids at first"
            raise RequestError("allowed_token_ids", message)


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
        request_id: unique among those under way.
        priority: smaller runs sooner, -MAX_PRIORITY to MAX_PRIORITY.
        cache_salt: only requests of the same salt share KV blocks.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            message = f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}, not {self.priority}"
            raise RequestError("priority", message)


class TokenOutput(NamedTuple):
    """What one step gave one request.

    Attributes:
        request_id: whose tokens these are.
        token_ids: the new tokens, in order; empty when it ended without one.
        finish_reason: set once, in the request's last output.
        stop_token_id: the id that ended it, itself the last of ``token_ids``.
        error: what went wrong, when ``finish_reason`` is ``error``.
        logprobs: one entry a token, where they were asked for.
        prompt_logprobs: entries of the next prompt tokens, where they were asked for.
        cached_tokens: prompt tokens whose keys and values were found, in the first output with
            tokens.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0


class TableCounts(NamedTuple):
    """What one layer asked of one value table, and what that cost.

    Attributes:
        table: its name in the checkpoint.
        tier: where its rows lie.
        layer: whose lookups these are.
        totals: since the table was loaded.
    """

    table: str
    tier: str
    layer: int
    totals: TableStatistics


@dataclass(frozen=True)
class EngineStatistics:
    """Gauges after a step, and totals since the engine was made.

    ``step_tokens`` counts the tokens that the step ran, ``new_tokens`` those that it gave,
    ``prefix_queries`` and ``prefix_hits`` prompt tokens that were looked for and found among the
    kept blocks. ``tables`` is None where they were not looked at. ``lost_tables`` says of each
    table that cannot be read any more which file it is, and why.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    step_tokens: int = 0
    new_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    tables: tuple[TableCounts, ...] | None = ()
    lost_tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """Everything that one step tells the outside."""

    outputs: tuple[TokenOutput, ...]
    statistics: EngineStatistics
