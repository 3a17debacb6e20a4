"""One table's part of a row patch: the ids of its rows, and the delta of each."""

import copy
import secrets

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_ops.anonymous import unpooled_zeros

EMPTY = -1
# indices into ``PatchedRows.words``: addresses of tensors, and fields
ROWS, DELTAS, INDEX, COUNTS, FACTOR, INDEX_BITS, IS_BF16 = range(7)
# a lookup looks at one place more than the run of taken places is long, at most; the longest run of
# a random factor has a few dozen places
_LONGEST_RUN = 128


class PatchedRows:
    """P rows of a table of width V, with a hash index for kernels; nothing is copied.

    Attributes:
        rows_P: int64 row ids, ascending, each once.
        deltas_PV: fp32 or bf16, finite and contiguous: what a patch adds to each row.
        index_I: int32, a power of two of places. The place of a row is the high bits of its id
            times ``factor``, or the next one that is free. A place has the row's number in
            ``rows_P``, or ``EMPTY``.
        factor: an odd int64 number, drawn at random: chosen ids cannot make lookups slow
            (multiplicative hashing, Knuth, The Art of Computer Programming, volume 3, section 6.4).
        counts: int64 [2], which every backend increases: row reads by tokens that use the patch,
            and those among them whose row the patch has.
        host_counts: a view of ``counts`` if they are in host memory, else empty.
        words: int64 [7], the addresses and fields that Triton kernels read.
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
        assert len(rows_P) <= np.iinfo(np.int32).max, "the index has int32 numbers"
        ids_P = rows_P.numpy()
        if not (ids_P[1:] > ids_P[:-1]).all() or (ids_P[:1] < 0).any():
            raise ValueError("rows: expected ascending ids, each once, none negative")
        self.rows_P, self.deltas_PV = rows_P, deltas_PV
        self.index_I = unpooled_zeros((1 << _index_bits(len(ids_P)),), torch.int32)
        # for regular ids about one factor of a hundred makes lookups slow: then draw another one
        is_fast = False
        while not is_fast:
            self.factor = secrets.randbits(64) // 2 * 2 + 1 - 2**63
            is_fast = _fill_index(self.index_I.numpy(), ids_P, self.factor)
        self._add_counts_and_words()

    def to(self, device: torch.device) -> "PatchedRows":
        """The rows copied to a device; returns when the copy is complete. Counts begin at 0."""
        moved = copy.copy(self)
        for name in ("rows_P", "deltas_PV", "index_I"):
            setattr(moved, name, getattr(self, name).to(device))
        moved._add_counts_and_words()
        if device.type == "cuda":
            # work on other streams may read them from now on
            torch.cuda.current_stream(device).synchronize()
        return moved

    @property
    def num_bytes(self) -> int:
        """Bytes of memory: ids, deltas and index."""
        return sum(tensor.nbytes for tensor in (self.rows_P, self.deltas_PV, self.index_I))

    def _add_counts_and_words(self) -> None:
        device = self.rows_P.device
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        is_on_host = self.counts.device.type == "cpu"
        self.host_counts = self.counts.numpy() if is_on_host else np.empty(0, dtype=np.int64)
        tensors = (self.rows_P, self.deltas_PV, self.index_I, self.counts)
        bits = len(self.index_I).bit_length() - 1
        fields = (self.factor, bits, int(self.deltas_PV.dtype is torch.bfloat16))
        words = [*(tensor.data_ptr() for tensor in tensors), *fields]
        self.words = torch.tensor(words, dtype=torch.int64, device=device)


def patched_bytes(num_rows: int, value_dim: int, itemsize: int) -> int:
    """``num_bytes`` of ``PatchedRows`` with deltas of this many values of ``itemsize`` bytes."""
    return num_rows * (8 + value_dim * itemsize) + (4 << _index_bits(num_rows))


def _index_bits(num_rows: int) -> int:
    # at least half of the places stay free, so that few probes find one
    return max(1, (2 * num_rows - 1).bit_length())


def _fill_index(
    index_I: "npt.NDArray[np.int32]", ids_P: "npt.NDArray[np.int64]", factor: int
) -> bool:
    """Fill the index; False if a lookup in it could take too long."""
    # in numpy: the threads of a large torch operation would delay a server's running requests
    mask = len(index_I) - 1
    home_P = (ids_P * np.int64(factor)) >> (64 - mask.bit_length()) & mask
    index_I.fill(EMPTY)
    waiting = np.arange(len(ids_P))
    for probes in range(_LONGEST_RUN):
        # of the rows that try one free place the last gets it; the others try the next place, so
        # that all places between a row's first one and its own are taken
        place = (home_P[waiting] + probes) & mask
        free = index_I[place] == EMPTY
        index_I[place[free]] = waiting[free]
        waiting = waiting[index_I[place] != waiting]
        if not len(waiting):
            # a row that the patch lacks is looked for to the end of the run
            empty = np.flatnonzero(index_I == EMPTY)
            around = empty[0] + len(index_I) - empty[-1]
            return bool(max(around, np.diff(empty).max(initial=0)) - 1 <= _LONGEST_RUN)
    return False
