"""Converts step plans to batches for an executor, and step results to results of chunks."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from engine.executors.batch import Batch, ScoredToken, StepResult, pending_id
from engine.sampling.masks import Bitmask
from engine.sampling.request_rules import RequestRules, SamplingRow
from engine.scheduling.step_plan import PENDING, ChunkResult, SequenceChunk, StepPlan

T = TypeVar("T")
# with a step in flight, a sequence that waits for its last token is in every second plan
_KEPT_PLANS = 2


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
    """Makes the batch of each plan; keeps the requests' logit rules between plans."""

    def __init__(self, block_size: int, eos_ids: frozenset[int]) -> None:
        self._block_size = block_size
        self._rows = SamplingRows(eos_ids)

    def batch(self, plan: StepPlan, bitmask: "Future[Bitmask] | None" = None) -> Batch:
        """The batch of a plan with at least one chunk.

        ``bitmask`` will have one row per sampled position, if token masks restrict any.
        """
        chunks = plan.chunks
        starts = (0, *accumulate(len(chunk.token_ids) for chunk in chunks))
        ids_T, positions_T, kv_index_T = _tokens(chunks, self._block_size)
        return Batch(
            ids_T=ids_T,
            positions_T=positions_T,
            query_starts=starts,
            kv_index_T=kv_index_T,
            context_lengths=tuple(chunk.end for chunk in chunks),
            block_ids=tuple(chunk.block_ids for chunk in chunks),
            seats=tuple(chunk.seat for chunk in chunks),
            logits_at_L=_logits_at(chunks, starts),
            rows=self._rows.of(plan),
            bitmask=bitmask,
            patches=[chunk.patches for chunk in chunks],
            scored=[one for chunk in chunks if chunk.scores for one in _scored(chunk)],
        )


def results_by_request(plan: StepPlan, result: StepResult) -> dict[str, ChunkResult]:
    """Split the results of a plan's batch."""
    results: dict[str, ChunkResult] = {}
    token_ids, logprobs, reads = result
    sampled, scored = 0, len(token_ids)
    for chunk in plan.chunks:
        sampled_end, scored_end = sampled + chunk.num_sampled, scored + len(chunk.scores)
        results[chunk.request_id] = ChunkResult(
            tuple(token_ids[sampled:sampled_end]),
            _between(logprobs, sampled, sampled_end),
            _between(logprobs, scored, scored_end),
            _between(reads, sampled, sampled_end),
        )
        sampled, scored = sampled_end, scored_end
    return results


def _scored(chunk: SequenceChunk) -> list[ScoredToken | None]:
    count = chunk.sampling.prompt_logprobs
    return [None if count is None else ScoredToken(token_id, count) for token_id in chunk.scores]


def _between(found: Mapping[int, T], start: int, end: int) -> tuple[T, ...]:
    if not found:
        return ()
    return tuple(found[at] for at in range(start, end) if at in found)


def _tokens(chunks: Sequence[SequenceChunk], block_size: int) -> Tensor:
    """Id, position and place in the KV blocks of each token, int64 ``[3, T]``."""
    # lists converted once: a tensor per chunk would cost more than all the rest
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    for chunk in chunks:
        ids += chunk.token_ids
        if ids[-1] == PENDING:
            ids[-1] = pending_id(chunk.seat)
        blocks = chunk.block_ids
        for position in range(chunk.start, chunk.end):
            positions.append(position)
            kv_index.append(blocks[position // block_size] * block_size + position % block_size)
    return torch.tensor([ids, positions, kv_index])


def _logits_at(chunks: Sequence[SequenceChunk], starts: Sequence[int]) -> Tensor:
    """The positions to compute logits at: first the sampled, then the scored ones, both in the
    order of the chunks."""
    sampled_at: list[int] = []
    scored_at: list[int] = []
    for chunk, (start, end) in zip(chunks, pairwise(starts), strict=True):
        sampled_at += range(end - chunk.num_sampled, end)
        scored_at += range(start, start + len(chunk.scores))
    return torch.tensor(sampled_at + scored_at, dtype=torch.int64)
