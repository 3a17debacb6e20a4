"""Rows for a replay of decode steps: as a trained model read them, or uniform.

Shape suffixes: N tokens, S steps, B sequences, M memory layers, H memory heads, K rows per head.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.memory.access import RecordedAccess
from benchmarks.row_trace import AccessTrace

# decode steps by batch: together they read no position of the trace's second half twice
STEPS: Mapping[int, int] = {1: 32, 8: 24, 32: 22, 64: 17}
SKEWS = ("recorded", "uniform")


class Recording(NamedTuple):
    """Rows of decode steps ``[S, M, B, H, K]``, and of other tokens that warm a cache."""

    decode_SMBHK: Tensor
    warm_NMHK: Tensor


def recording(trace: AccessTrace, skew: str, num_rows: int, batch: int) -> Recording:
    """Rows of a table of ``num_rows``, a power of two, for a batch of ``STEPS``."""
    num_tokens, layers, heads, top_k = trace.rows_TMHK.shape
    half, steps = num_tokens // 2, STEPS[batch]
    shape = (steps, layers, batch, heads, top_k)
    if skew == "uniform":
        generator = torch.Generator().manual_seed(batch)
        decode_SMBHK = torch.randint(num_rows, shape, generator=generator)
        warm_NMHK = torch.randint(num_rows, (half, *trace.rows_TMHK.shape[1:]), generator=generator)
        return Recording(decode_SMBHK, warm_NMHK)
    access = RecordedAccess(trace, num_rows)
    first = sum(count * number for number, count in STEPS.items() if number < batch)
    rows = [
        access.rows(0, first + sequence * steps + step, memory)
        for step in range(steps)
        for memory in range(layers)
        for sequence in range(batch)
    ]
    warm = [
        access.rows(0, position, memory, warm_up=True)
        for position in range(half)
        for memory in range(layers)
    ]
    return Recording(
        torch.stack(rows).view(shape), torch.stack(warm).view(half, layers, heads, top_k)
    )
