"""Converts step plans to batches for an executor, and step results to results of chunks."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.executors.batch import Batch, ScoredToken, StepResult, pending_id
from engine.model.layout import PagedKv, TokenLayout
from engine.sampling.masks import Bitmask
from engine.sampling.params import TokenLogprobs
from engine.sampling.request_rules import RequestRules, SamplingRow
from engine.scheduling.step_plan import PENDING, ChunkResult, SequenceChunk, StepPlan

# with a step in flight, a sequence that waits for its last token is in every second plan
_KEPT_PLANS = 2


class BlockTable:
    """The block ids of each step's sequences, one row per sequence, kept between steps.

    Only new ids are written: a decoding sequence adds one id every ``block_size`` steps, while a
    long context has thousands. If a row's sequence changes, the whole row is written.
    """

    def __init__(self) -> None:
        self._ids_SB = np.zeros((0, 0), dtype=np.int64)
        self._rows: list[tuple[int, ...]] = []  # ids known to be in each row

    def update(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """The table for these chunks, int64 ``[S, largest number of blocks]``, a strided view.

        Entries after a sequence's ids are arbitrary. The next call overwrites the tensor.
        """
        width = max(len(chunk.block_ids) for chunk in chunks)
        self._reserve(len(chunks), width)
        for row, chunk in enumerate(chunks):
            known, ids = self._rows[row], chunk.block_ids
            if ids != known:
                same = len(known) if ids[: len(known)] == known else 0
                self._ids_SB[row, same : len(ids)] = ids[same:]
                self._rows[row] = ids
        return torch.from_numpy(self._ids_SB[: len(chunks), :width])

    def _reserve(self, num_rows: int, width: int) -> None:
        self._rows += [()] * (num_rows - len(self._rows))
        old_SB = self._ids_SB
        rows, columns = old_SB.shape
        if num_rows > rows or width > columns:
            # powers of two keep the total cost of growth low
            sizes = max(rows, num_rows), max(columns, width)
            self._ids_SB = np.zeros([1 << (n - 1).bit_length() for n in sizes], dtype=np.int64)
            self._ids_SB[:rows, :columns] = old_SB


class SamplingRows:
    """Makes the sampling rows of each plan and keeps the requests' rules between plans."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids
        self._num_plans = 0
        self._rules: dict[str, tuple[int, RequestRules]] = {}  # with the plan that used them last

    def of(self, plan: StepPlan) -> list[SamplingRow]:
        """One row per sampled position of the plan, in order."""
        self._num_plans += 1
        rows: list[SamplingRow] = []
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            end = chunk.end - chunk.num_drafts
            rules = None
            if chunk.sampling.has_rules_after(end - chunk.prompt_length):
                rules = self._follow(chunk)
            rows.append(SamplingRow(chunk.sampling, chunk.seed, end, rules))
            for count in range(1, chunk.num_drafts + 1):
                drafts = chunk.drafts[:count]
                rows.append(SamplingRow(chunk.sampling, chunk.seed, end + count, rules, drafts))
        unused = [n for n, (used, _) in self._rules.items() if used < self._num_plans - _KEPT_PLANS]
        for name in unused:
            del self._rules[name]
        return rows

    def _follow(self, chunk: SequenceChunk) -> RequestRules:
        # rules that were dropped are made again from the history
        _, rules = self._rules.get(chunk.request_id, (0, None))
        is_first = chunk.end - chunk.num_drafts == chunk.prompt_length
        if rules is None or is_first:
            rules = RequestRules(chunk.sampling, chunk.prompt_length, self._eos_ids)
        rules.follow(chunk.history)
        self._rules[chunk.request_id] = self._num_plans, rules
        return rules


class Batcher:
    """Makes the batch of each plan, valid until the next one; caches block ids and logit rules."""

    def __init__(self, block_size: int, eos_ids: frozenset[int]) -> None:
        self._block_size = block_size
        self._rows = SamplingRows(eos_ids)
        self._table = BlockTable()

    def batch(self, plan: StepPlan, bitmask: "Future[Bitmask] | None" = None) -> Batch:
        """The batch of a plan with at least one chunk.

        ``bitmask`` will have one row per sampled position, if token masks restrict any.
        """
        scored = [one for chunk in plan.chunks if chunk.scores for one in _scored(chunk)]
        return Batch(
            *_tensors(plan.chunks, self._block_size, self._table),
            seats=tuple(chunk.seat for chunk in plan.chunks),
            block_ids=tuple(chunk.block_ids for chunk in plan.chunks),
            rows=self._rows.of(plan),
            bitmask=bitmask,
            scored=scored,
        )


def chunk_results(plan: StepPlan, result: StepResult) -> dict[str, ChunkResult]:
    """Split the results of a plan's batch by request."""
    results: dict[str, ChunkResult] = {}
    token_ids, logprobs = result
    sampled, scored = 0, len(token_ids)
    for chunk in plan.chunks:
        sampled_end, scored_end = sampled + chunk.num_sampled, scored + len(chunk.scores)
        results[chunk.request_id] = ChunkResult(
            tuple(token_ids[sampled:sampled_end]),
            _between(logprobs, sampled, sampled_end),
            _between(logprobs, scored, scored_end),
        )
        sampled, scored = sampled_end, scored_end
    return results


def _scored(chunk: SequenceChunk) -> list[ScoredToken | None]:
    count = chunk.sampling.prompt_logprobs
    return [None if count is None else ScoredToken(token_id, count) for token_id in chunk.scores]


def _between(
    logprobs: Mapping[int, TokenLogprobs], start: int, end: int
) -> tuple[TokenLogprobs, ...]:
    if not logprobs:
        return ()
    return tuple(logprobs[at] for at in range(start, end) if at in logprobs)


def _tensors(
    chunks: Sequence[SequenceChunk], block_size: int, table: BlockTable
) -> tuple[Tensor, TokenLayout, Tensor]:
    """Token ids, their layout, and the positions to compute logits at: first the sampled, then the
    scored ones, both in the order of the chunks."""
    starts = (0, *accumulate(len(chunk.token_ids) for chunk in chunks))
    # lists converted once: a tensor per chunk would cost more than all the rest
    positions: list[int] = []
    kv_index: list[int] = []
    sampled_at: list[int] = []
    scored_at: list[int] = []
    for chunk, start in zip(chunks, starts, strict=False):
        blocks = chunk.block_ids
        for position in range(chunk.start, chunk.end):
            positions.append(position)
            kv_index.append(blocks[position // block_size] * block_size + position % block_size)
        if chunk.samples:
            end = start + len(chunk.token_ids)
            sampled_at += range(end - chunk.num_sampled, end)
        scored_at += range(start, start + len(chunk.scores))
    ids = [
        pending_id(chunk.seat) if token_id == PENDING else token_id
        for chunk in chunks
        for token_id in chunk.token_ids
    ]
    ids_T, positions_T, kv_index_T = torch.tensor([ids, positions, kv_index])
    paged = PagedKv(kv_index_T, table.update(chunks), tuple(chunk.end for chunk in chunks))
    layout = TokenLayout(positions_T, starts, paged)
    return ids_T, layout, torch.tensor(sampled_at + scored_at, dtype=torch.int64)
