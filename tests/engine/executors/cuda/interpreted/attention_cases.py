"""Steps over scattered KV blocks; memory that no token may read is poisoned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.executors.cuda.kernels.kv_formats import fp8_codes_reference, kv_values_reference
from engine.executors.cuda.kernels.paged_attention import (
    paged_attention,
    paged_attention_reference,
)
from engine.executors.cuda.kernels.paged_step import PagedStep, most_query_tiles, query_tiles
from tests.conftest import TOLERANCE

FP8_NAN = 0x7F
SPARE_ROWS, SPARE_SEATS, SPARE_BLOCKS = 3, 2, 2
# also arbitrary numbers in tables must not lead a kernel anywhere
NO_BLOCK = 2**30


@dataclass(frozen=True)
class AttentionCase:
    """Operands of one call.

    Attributes:
        q_THE: queries in wider rows; NaN in rows that belong to no sequence.
        kv_blocks: every other block of its memory; NaN (fp8: the code of NaN) in unused slots.
        step: the sequences.
    """

    q_THE: Tensor
    kv_blocks: Tensor
    step: PagedStep

    def run(self, num_splits: int = 1) -> Tensor:
        """The kernels' result, NaN in rows that they do not write."""
        num_rows, num_heads, head_dim = self.q_THE.shape
        wide_TF = torch.full((num_rows, num_heads * head_dim + 8), torch.nan).to(self.q_THE.dtype)
        out_THE = wide_TF[:, :-8].unflatten(1, (num_heads, head_dim))
        paged_attention(
            self.q_THE, self.kv_blocks, self.step, num_splits=num_splits, out_THE=out_THE
        )
        assert wide_TF[:, -8:].isnan().all()
        return out_THE

    def exact(self) -> Tensor:
        """The twin's result in fp64, NaN in rows that belong to no sequence."""
        q_THE = self.q_THE.double()
        kv_blocks = kv_values_reference(self.kv_blocks, torch.float64)
        out_THE = torch.full_like(q_THE, torch.nan)
        paged_attention_reference(q_THE, kv_blocks, self.step, num_splits=1, out_THE=out_THE)
        assert not out_THE[: self.step.query_starts_S1[-1]].isnan().any()
        return out_THE

    def check(self, num_splits: int = 1) -> None:
        """Assert that the kernels write the exact result, and only to rows of sequences."""
        rtol, atol = TOLERANCE[self.q_THE.dtype]
        exact_THE = self.exact().to(self.q_THE.dtype)
        out_THE = self.run(num_splits)
        torch.testing.assert_close(out_THE, exact_THE, rtol=rtol, atol=atol, equal_nan=True)


def attention_case(
    counts: Sequence[int],
    lengths: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    num_shared: int = 0,
) -> AttentionCase:
    """Sequences with these numbers of tokens in the step, and these lengths with them.

    Up to ``num_shared`` full blocks at the start of the first sequence start all others too.
    """
    shape = (2, num_kv_heads, block_size, head_dim)
    num_blocks = [-(-length // block_size) for length in lengths]
    # no sequence has block 0, whose id masked loads give
    free = 1 + torch.randperm(sum(num_blocks) + SPARE_BLOCKS).int()
    memory = torch.full(
        (2 * len(free) + 2, *shape),
        FP8_NAN if fp8 else torch.nan,
        dtype=torch.uint8 if fp8 else dtype,
    )
    kv_blocks = memory[::2]
    table_PB = torch.full(
        (len(counts) + SPARE_SEATS, max(num_blocks, default=0) + 1), NO_BLOCK, dtype=torch.int32
    )
    seats_S = torch.randperm(len(table_PB))[: len(counts)]
    for seat, length, num_own in zip(seats_S, lengths, num_blocks, strict=True):
        ids, free = free[:num_own].clone(), free[num_own:]
        shared = min(num_shared, length // block_size, lengths[0] // block_size)
        if seat != seats_S[0]:
            ids[:shared] = table_PB[seats_S[0], :shared]
        table_PB[seat, :num_own] = ids
        places = torch.arange(length)
        values = torch.randn(length, 2, num_kv_heads, head_dim)
        stored = fp8_codes_reference(values) if fp8 else values.to(dtype)
        kv_blocks[ids[places // block_size], :, :, places % block_size] = stored
    return AttentionCase(
        poisoned_queries(sum(counts), num_heads, head_dim, dtype),
        kv_blocks,
        paged_step(counts, lengths, seats_S, table_PB, num_heads // num_kv_heads),
    )


def poisoned_queries(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Random queries in rows of wider ones; NaN around them and in a few rows after them."""
    num_rows, width = num_tokens + SPARE_ROWS, num_heads * head_dim
    wide_TF = torch.full((num_rows, width + 16), torch.nan, dtype=dtype)
    wide_TF[:num_tokens, :width] = torch.randn(num_tokens, width)
    return wide_TF[:, :width].unflatten(1, (num_heads, head_dim))


def paged_step(
    counts: Sequence[int], lengths: Sequence[int], seats_S: Tensor, table_PB: Tensor, group: int
) -> PagedStep:
    """A step with all tiles that the host may need; without any if all counts are 1."""
    tiles_I2 = query_tiles(counts, group, most_query_tiles(sum(counts), len(counts)))
    return PagedStep(
        query_starts_S1=torch.tensor([0, *counts]).cumsum(0),
        context_lengths_S=torch.tensor(lengths, dtype=torch.int64),
        seats_S=seats_S,
        block_table_PB=table_PB,
        tiles_I2=torch.from_numpy(tiles_I2) if max(counts, default=0) > 1 else None,
    )
