"""A step plan as the tensors of one ragged forward."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.ops.layout import PagedKv, TokenLayout
from engine.step_plan import StepPlan


@dataclass(frozen=True)
class Batch:
    """What the model is called with.

    Attributes:
        ids_T: int64 token ids of all chunks, one after another.
        layout: their places in sequences and KV blocks.
        logits_at_L: int64 positions in the batch whose logits are wanted: first those at which
            tokens are chosen, then those that score prompts, both in the order of the chunks.
    """

    ids_T: Tensor
    layout: TokenLayout
    logits_at_L: Tensor


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

    ids_T, positions_T, kv_index_T = torch.tensor([ids, positions, kv_index], device=device)
    table_SB = torch.from_numpy(np.array(table, dtype=np.int64)).to(device)
    paged = PagedKv(kv_index_T, table_SB, tuple(contexts))
    return Batch(
        ids_T=ids_T,
        layout=TokenLayout(positions_T, starts, paged),
        logits_at_L=torch.tensor(sampled_at + scored_at, dtype=torch.int64, device=device),
    )
