"""Requests, outputs and statistics of the engine, as plain data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from engine.errors import ContextLengthError, RequestError
from engine.sampling.grammar import Grammar
from engine.sampling.params import SamplingParams, TokenLogprobs
from memory_ops.tables.table_statistics import TableStatistics

FinishReason = Literal["stop", "length", "error"]
MAX_PRIORITY = 100
# row patches of a request; executors have space for as many uses of each sequence
MAX_PATCH_USES = 16
MAX_PATCH_SCALE = 100


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a loaded model; the server checks requests against them, and so does the engine."""

    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int] = frozenset()
    has_memory: bool = False

    def check(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Raise RequestError for an empty prompt, an unknown token id, or too many tokens."""
        length = len(prompt_ids)
        if not length:
            raise RequestError("prompt", "is empty; it needs at least one token")
        if length > self.max_model_len - (sampling.max_tokens > 0):
            without = " without an answer" if length == self.max_model_len else ""
            message = f"has {length} tokens{without}"
            raise ContextLengthError("prompt", message, self.max_model_len)
        if length + sampling.max_tokens > self.max_model_len:
            message = f"is {sampling.max_tokens} and the prompt has {length} tokens"
            raise ContextLengthError("max_tokens", message, self.max_model_len)
        for param, ids in {"prompt": prompt_ids, **sampling.listed_ids}.items():
            wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
            if wrong is not None:
                raise RequestError(param, f"token id {wrong} is outside [0, {self.vocab_size})")
        if sampling.memory_trace and not self.has_memory:
            raise RequestError("memory_trace", "this model has no memory layers")
        allowed, ends = sampling.allowed_token_ids, sampling.stop_token_ids | self.eos_ids
        if sampling.min_tokens and allowed is not None and allowed <= ends:
            message = "all of them end the answer, which min_tokens forbids at first"
            raise RequestError("allowed_token_ids", message)


class PatchRef(NamedTuple):
    """A loaded row patch and the scale of its deltas."""

    content_hash: str
    scale: float = 1.0


class PatchSummary(NamedTuple):
    """A loaded row patch.

    Attributes:
        content_hash: BLAKE3 of its rows and deltas, in hexadecimal.
        num_rows: rows over all tables.
        num_bytes: bytes of memory: ids, deltas and hash indexes.
        tables: rows in each table that it changes, by table name.
        data: hash of the data that it was learned from; None if there is none.
    """

    content_hash: str
    num_rows: int
    num_bytes: int
    tables: Mapping[str, int]
    data: str | None = None


def canonical_patches(refs: Iterable[PatchRef]) -> tuple[PatchRef, ...]:
    """The patches in the order in which they add up: by hash. Scales of one patch are added;
    patches with scale 0 are omitted.

    Raises:
        RequestError: a scale is beyond MAX_PATCH_SCALE or not a number, or there are more than
            MAX_PATCH_USES patches.
    """
    scales: dict[str, float] = {}
    for content_hash, scale in refs:
        scales[content_hash] = scales.get(content_hash, 0.0) + scale
    # this is false for NaN too
    wrong = [scale for scale in scales.values() if not abs(scale) <= MAX_PATCH_SCALE]
    if wrong:
        message = f"scale must be -{MAX_PATCH_SCALE} to {MAX_PATCH_SCALE}, not {wrong[0]}"
        raise RequestError("memory_patches", message)
    found = tuple(PatchRef(*pair) for pair in sorted(scales.items()) if pair[1])
    if len(found) > MAX_PATCH_USES:
        message = f"has {len(found)} patches, but at most {MAX_PATCH_USES} are allowed"
        raise RequestError("memory_patches", message)
    return found


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        request_id: unique among the unfinished requests.
        priority: smaller runs sooner, -MAX_PRIORITY to MAX_PRIORITY.
        cache_salt: only requests with the same salt share KV blocks.
        grammar: the answer follows it, and ends where the grammar is complete.
        patches: the row patches of its memory layers, in canonical order.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None
    patches: tuple[PatchRef, ...] = ()

    def __post_init__(self) -> None:
        assert self.patches == canonical_patches(self.patches)
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            message = f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}, not {self.priority}"
            raise RequestError("priority", message)

    @property
    def prefix_salt(self) -> str:
        """The salt of its prefix hashes: equal prefixes with other patches share no KV blocks."""
        return repr((self.cache_salt, self.patches))


class MemoryRead(NamedTuple):
    """The rows that one memory layer read for one token.

    Attributes:
        rows: the rows with the largest weights, largest first.
        weights: their weights, summed over the heads; each head's weights add up to 1.
    """

    layer: int
    rows: tuple[int, ...]
    weights: tuple[float, ...]


class TokenOutput(NamedTuple):
    """The output of one step for one request.

    Attributes:
        token_ids: the new tokens, in order; empty if the request ended without one.
        finish_reason: set in the request's last output.
        stop_token_id: the id that ended the request, also the last of ``token_ids``.
        error: the message, if ``finish_reason`` is ``error``.
        error_param: the field of the request that caused the error; None if the engine failed.
        logprobs: one entry per token, if requested.
        prompt_logprobs: entries of the next prompt tokens, if requested.
        cached_tokens: prompt tokens found in the prefix cache, in the first output with tokens.
        memory_reads: for each token one read per memory layer, if requested.
        draft_tokens: draft tokens that the step verified.
        accepted_tokens: those among ``token_ids``.
        queued_s: seconds from the request's arrival in the engine to its first step.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    error_param: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    memory_reads: tuple[tuple[MemoryRead, ...], ...] = ()
    draft_tokens: int = 0
    accepted_tokens: int = 0
    queued_s: float = 0.0


class RowUsageSummary(NamedTuple):
    """Reads of a value table's rows, counted in a sample of all steps.

    Attributes:
        num_reads: reads that were counted.
        most_read: (row, reads) of the rows with the most reads, most first.
        histogram: (n, number of rows with n to 2 n - 1 reads).
    """

    num_reads: int
    most_read: tuple[tuple[int, int], ...]
    histogram: tuple[tuple[int, int], ...]


class TableReport(NamedTuple):
    """A value table and the reads of its rows.

    Attributes:
        layers: the memory layers that read it.
        usage: None for PEER's table of down projections, which is read like its other table.
    """

    name: str
    tier: str
    num_rows: int
    value_dim: int
    layers: tuple[int, ...]
    usage: RowUsageSummary | None


def refused_output(request_id: str, error: RequestError) -> TokenOutput:
    """The only output of a request that the engine refuses."""
    return TokenOutput(request_id, (), "error", error=str(error), error_param=error.param)


class TableCounts(NamedTuple):
    """Lookups of one layer in one value table, and their cost, since the table was loaded."""

    table: str
    tier: str
    layer: int
    totals: TableStatistics


class PatchStatistics(NamedTuple):
    """Row reads of the tokens that use a row patch, since they were last read.

    Reads of a removed patch are lost if its last request ends before they are read.

    Attributes:
        reads: rows that their memory layers read from tables that the patch changes.
        hits: those among them that the patch changes.
    """

    content_hash: str
    reads: int
    hits: int


@dataclass(frozen=True)
class EngineStatistics:
    """Gauges after a step, and totals since the engine was made.

    Attributes:
        step_tokens: tokens that the step ran.
        new_tokens: tokens that the step generated.
        prefix_queries: prompt tokens looked up in the prefix cache; ``prefix_hits`` were found.
        drafts: results of chunks with draft tokens; they had ``draft_tokens`` in total, of which
            ``accepted_tokens`` became part of an answer.
        tables: counts by table and layer; None if this step did not read them.
        patches: reads of row patches since they were last read, about once a second.
        lost_tables: for each unreadable table, the file and the error.
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
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    tables: tuple[TableCounts, ...] | None = ()
    patches: tuple[PatchStatistics, ...] = ()
    lost_tables: tuple[str, ...] = ()


class StepOutput(NamedTuple):
    """All outputs of one step."""

    outputs: tuple[TokenOutput, ...]
    statistics: EngineStatistics
