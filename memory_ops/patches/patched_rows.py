"""One table's part of a row patch: the ids of its rows, and what is added to each of them."""

import torch
from torch import Tensor

# 2^64 divided by the golden ratio, as a signed number: multiples spread over all bits (Knuth, The
# Art of Computer Programming, volume 3, section 6.4); row_patches.h and the GPU kernel use it too
HASH_FACTOR = 0x9E3779B97F4A7C15 - 2**64
EMPTY = -1


class PatchedRows:
    """P rows of a table of width V, with a hash index for kernels; nothing is copied.

    Attributes:
        rows_P: int64 row ids, ascending, each once.
        deltas_PV: fp32 or bf16, finite and contiguous: what a patch adds to each row.
        index_I: int32, a power of two of places. The place of a row is the high bits of its id
            times ``HASH_FACTOR``, or the next one that is free. A place has the row's number in
            ``rows_P``, or ``EMPTY``.
        most_probes: places to look at before a row is certainly not there.
    """

    def __init__(self, rows_P: Tensor, deltas_PV: Tensor) -> None:
        """Index the rows.

        Raises:
            ValueError: ids or deltas have another dtype or shape, or the ids are not ascending.
        """
        if rows_P.dtype is not torch.int64 or rows_P.dim() != 1:
            raise ValueError(f"rows: expected int64 [P], got {rows_P.dtype} {tuple(rows_P.shape)}")
        if deltas_PV.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"deltas: expected float32 or bfloat16, got {deltas_PV.dtype}")
        if deltas_PV.dim() != 2 or len(deltas_PV) != len(rows_P) or not deltas_PV.is_contiguous():
            found = f"{tuple(deltas_PV.shape)} for {len(rows_P)} rows"
            raise ValueError(f"deltas: expected contiguous [P, V], got {found}")
        if not bool((rows_P.diff() > 0).all()) or bool((rows_P[:1] < 0).any()):
            raise ValueError("rows: expected ascending ids, each once, none negative")
        self.rows_P, self.deltas_PV = rows_P, deltas_PV
        self.index_I, self.most_probes = _index(rows_P)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory: ids, deltas and index."""
        return sum(tensor.nbytes for tensor in (self.rows_P, self.deltas_PV, self.index_I))


def _index(rows_P: Tensor) -> tuple[Tensor, int]:
    """The index and the largest number of probes that finds a row."""
    # at least half of the places stay free, so that few probes find one
    bits = max(1, (2 * len(rows_P) - 1).bit_length())
    mask = 2**bits - 1
    home_P = (rows_P * HASH_FACTOR) >> (64 - bits) & mask
    index_I = torch.full((2**bits,), EMPTY, dtype=torch.int32)
    waiting = torch.arange(len(rows_P))
    probes = 0
    while len(waiting):
        # of the rows that try one free place the last gets it; the others try the next place, so
        # that all places between a row's first one and its own are taken
        place = (home_P[waiting] + probes) & mask
        free = index_I[place] == EMPTY
        index_I[place[free]] = waiting[free].to(torch.int32)
        waiting = waiting[index_I[place] != waiting]
        probes += 1
    return index_I, probes
