"""A step plan as the tensors of one ragged forward."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.ops.layout import PagedKv, TokenLayout
from engine.step_plan import SequenceChunk, StepPlan


@dataclass(frozen=True)
class Batch:
    """What the model is called with, and who gets the logits.

    Attributes:
        ids_T: int64 token ids of all chunks, one after another.
        layout: their places in sequences and KV blocks.
        logits_at_L: int64, the last token of every chunk that is to be sampled.
        sampled: those chunks, in the order of the logits.
    """

    ids_T: Tensor
    layout: TokenLayout
    logits_at_L: Tensor
    sampled: tuple[SequenceChunk, ...]


def make_batch(plan: StepPlan, block_size: int, device: torch.device) -> Batch:
    """Turn a plan with at least one chunk into tensors on ``device``."""
    chunks = plan.chunks
    block_ids = tuple(torch.tensor(chunk.block_ids, device=device) for chunk in chunks)
    positions = [torch.arange(chunk.start, chunk.end, device=device) for chunk in chunks]
    kv_index = [
        ids[at // block_size] * block_size + at % block_size
        for ids, at in zip(block_ids, positions, strict=True)
    ]
    starts = (0, *accumulate(len(chunk.token_ids) for chunk in chunks))
    layout = TokenLayout(
        positions_T=torch.cat(positions),
        query_starts=starts,
        paged=PagedKv(torch.cat(kv_index), block_ids, tuple(chunk.end for chunk in chunks)),
    )
    ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    ends = zip(chunks, starts[1:], strict=True)
    logits_at = [end - 1 for chunk, end in ends if chunk.sampling is not None]
    return Batch(
        ids_T=torch.tensor(ids, device=device),
        layout=layout,
        logits_at_L=torch.tensor(logits_at, dtype=torch.int64, device=device),
        sampled=tuple(chunk for chunk in chunks if chunk.sampling is not None),
    )
