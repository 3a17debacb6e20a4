"""A step plan as the tensors of one ragged forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.ops.layout import PagedKv, TokenLayout
from engine.step_plan import SequenceChunk, StepPlan


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


class BlockTable:
    """The block ids of each step's sequences, a row each, kept from step to step.

    A row is written only where its ids are new: decoding sequences add one id in ``block_size``
    steps, and long ones have thousands. A row whose sequence is another one is written anew.
    """

    def __init__(self) -> None:
        self._ids_SB = np.zeros((0, 0), dtype=np.int64)
        self._rows: list[tuple[int, ...]] = []  # what the rows begin with

    def update(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """The table for these chunks, int64 ``[S, most blocks]``; rows lie farther apart.

        Behind a sequence's ids stands anything. The next call changes the tensor.
        """
        width = max(len(chunk.block_ids) for chunk in chunks)
        self._reserve(len(chunks), width)
        for row, chunk in enumerate(chunks):
            known, ids = self._rows[row], chunk.block_ids
            same = len(known) if ids[: len(known)] == known else 0
            if same < len(ids):
                self._ids_SB[row, same : len(ids)] = ids[same:]
            self._rows[row] = ids
        return torch.from_numpy(self._ids_SB[: len(chunks), :width])

    def _reserve(self, num_rows: int, width: int) -> None:
        self._rows += [()] * (num_rows - len(self._rows))
        old_SB = self._ids_SB
        rows, columns = old_SB.shape
        if num_rows > rows or width > columns:
            # to the next powers of two, so that growing costs little altogether
            shape = (
                1 << (max(rows, num_rows) - 1).bit_length(),
                1 << (max(columns, width) - 1).bit_length(),
            )
            self._ids_SB = np.zeros(shape, dtype=np.int64)
            self._ids_SB[:rows, :columns] = old_SB


def make_batch(
    plan: StepPlan, block_size: int, device: torch.device, table: BlockTable | None = None
) -> Batch:
    """Turn a plan with at least one chunk into tensors on ``device``.

    A ``table`` that is kept from step to step saves work; the next step changes the batch then.
    """
    chunks = plan.chunks
    starts = (0, *accumulate(len(chunk.token_ids) for chunk in chunks))
    # gathered in lists and handed over once: a tensor a chunk would cost more than all the rest
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
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
        if chunk.samples:
            end = start + len(chunk.token_ids)
            sampled_at += range(end - chunk.num_sampled, end)
        scored_at += range(start, start + len(chunk.scores))

    ids_T, positions_T, kv_index_T = torch.tensor([ids, positions, kv_index], device=device)
    table_SB = (table or BlockTable()).update(chunks).to(device)
    paged = PagedKv(kv_index_T, table_SB, tuple(contexts))
    return Batch(
        ids_T=ids_T,
        layout=TokenLayout(positions_T, starts, paged),
        logits_at_L=torch.tensor(sampled_at + scored_at, dtype=torch.int64, device=device),
    )
