"""Turns step plans into batches for an executor, and step results into results of chunks."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch

from engine.executors.batch import Batch, ScoredToken, StepResult
from engine.model.layout import PagedKv, TokenLayout
from engine.sampling.masks import Bitmask, step_bitmask
from engine.sampling.params import TokenLogprobs
from engine.scheduling.sampling_rows import SamplingRows
from engine.scheduling.step_plan import ChunkResult, SequenceChunk, StepPlan


class Batcher:
    """Makes batches of one plan after another; keeps between them what changes slowly."""

    def __init__(self, block_size: int, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._rows = SamplingRows(eos_ids)

    def batch(self, plan: StepPlan, bitmasks: Mapping[str, Bitmask]) -> Batch:
        """The batch of a plan with at least one chunk.

        ``bitmasks`` has those of requests whose tokens are restricted, a row for each sampled
        position.
        """
        parts = ((chunk.num_sampled, bitmasks.get(chunk.request_id)) for chunk in plan.chunks)
        scored = [one for chunk in plan.chunks for one in _scored(chunk)]
        return Batch(
            *_tensors(plan.chunks, self._block_size),
            rows=self._rows.of(plan),
            bitmask=step_bitmask(parts, self._vocab_size),
            scored=scored,
        )


def chunk_results(plan: StepPlan, result: StepResult) -> dict[str, ChunkResult]:
    """The results of a plan's batch, dealt out to its chunks, by request."""
    results: dict[str, ChunkResult] = {}
    sampled, scored = 0, len(result.token_ids)
    for chunk in plan.chunks:
        sampled_end, scored_end = sampled + chunk.num_sampled, scored + len(chunk.scores)
        results[chunk.request_id] = ChunkResult(
            tuple(result.token_ids[sampled:sampled_end]),
            _wanted(result.logprobs[sampled:sampled_end]),
            _wanted(result.logprobs[scored:scored_end]),
        )
        sampled, scored = sampled_end, scored_end
    return results


def _scored(chunk: SequenceChunk) -> list[ScoredToken | None]:
    count = chunk.sampling.prompt_logprobs
    return [None if count is None else ScoredToken(token_id, count) for token_id in chunk.scores]


def _wanted(logprobs: Sequence[TokenLogprobs | None]) -> tuple[TokenLogprobs, ...]:
    return tuple(one for one in logprobs if one is not None)


def _tensors(
    chunks: Sequence[SequenceChunk], block_size: int
) -> tuple[torch.Tensor, TokenLayout, torch.Tensor]:
    """Token ids, their layout, and the positions whose logits are wanted: first those that choose
    tokens, then those that score them, both in the order of the chunks."""
    starts = (0, *accumulate(len(chunk.token_ids) for chunk in chunks))
    width = max(len(chunk.block_ids) for chunk in chunks)
    # gathered in lists and handed over once: a tensor a chunk would cost more than all the rest
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    table: list[tuple[int, ...]] = []
    contexts: list[int] = []
    sampled_at: list[int] = []
    scored_at: list[int] = []
    for chunk, start in zip(chunks, starts, strict=False):
        blocks = chunk.block_ids
        ids += chunk.token_ids
        contexts.append(chunk.end)
        for position in range(chunk.start, contexts[-1]):
            positions.append(position)
            kv_index.append(blocks[position // block_size] * block_size + position % block_size)
        table.append(blocks + (0,) * (width - len(blocks)))
        if chunk.samples:
            end = start + len(chunk.token_ids)
            sampled_at += range(end - chunk.num_sampled, end)
        scored_at += range(start, start + len(chunk.scores))

    ids_T, positions_T, kv_index_T = torch.tensor([ids, positions, kv_index])
    table_SB = torch.from_numpy(np.array(table, dtype=np.int64))
    layout = TokenLayout(positions_T, starts, PagedKv(kv_index_T, table_SB, tuple(contexts)))
    return ids_T, layout, torch.tensor(sampled_at + scored_at, dtype=torch.int64)
