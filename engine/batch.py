"""A step plan as the tensors of one ragged forward."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.logit_rules import SamplingRow
from engine.ops.layout import PagedKv, TokenLayout
from engine.step_plan import SequenceChunk, StepPlan


@dataclass(frozen=True)
class Batch:
    """What the model is called with, and who gets the logits.

    Attributes:
        ids_T: int64 token ids of all chunks, one after another.
        layout: their places in sequences and KV blocks.
        logits_at_L: int64 positions in the batch whose logits are wanted: first those at which
            tokens are chosen, then those that score prompts, both in the order of the chunks.
        rows: how to choose, for each of the former.
    """

    ids_T: Tensor
    layout: TokenLayout
    logits_at_L: Tensor
    rows: tuple[SamplingRow, ...]


def make_batch(plan: StepPlan, block_size: int, device: torch.device) -> Batch:
    """Turn a plan with at least one chunk into tensors on ``device``."""
    chunks = plan.chunks
    starts = (0, *accumulate(len(chunk.token_ids) for chunk in chunks))
    width = max(len(chunk.block_ids) for chunk in chunks)
    # gathered in lists and handed over once: a tensor a chunk would cost more than all the rest
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    table: list[tuple[int, ...]] = []
    sampled_at: list[int] = []
    scored_at: list[int] = []
    for chunk, start in zip(chunks, starts, strict=False):
        blocks = chunk.block_ids
        ids += chunk.token_ids
        for position in range(chunk.start, chunk.end):
            positions.append(position)
            kv_index.append(blocks[position // block_size] * block_size + position % block_size)
        table.append(blocks + (0,) * (width - len(blocks)))
        end = start + len(chunk.token_ids)
        sampled_at += range(end - chunk.num_sampled, end)
        scored_at += range(start, start + len(chunk.scores))

    def tensor(values: list[int] | list[tuple[int, ...]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    paged = PagedKv(tensor(kv_index), tensor(table), tuple(chunk.end for chunk in chunks))
    return Batch(
        ids_T=tensor(ids),
        layout=TokenLayout(tensor(positions), starts, paged),
        logits_at_L=tensor(sampled_at + scored_at),
        rows=tuple(row for chunk in chunks for row in _rows(chunk)),
    )


def _rows(chunk: SequenceChunk) -> list[SamplingRow]:
    if not chunk.samples:
        return []
    drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
    return [
        SamplingRow(
            params=chunk.sampling,
            seed=chunk.seed,
            position=chunk.end - chunk.num_drafts + index,
            history=chunk.history + drafts[:index] if chunk.history else (),
            prompt_length=chunk.prompt_length,
        )
        for index in range(chunk.num_sampled)
    ]
