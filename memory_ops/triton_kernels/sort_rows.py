"""Sorts references to rows by the rows' keys, as a Triton kernel: one program per 8 references.

For each of its references a program counts the references that precede it: its place in the sorted
order. This takes L * L comparisons. For a few thousand references a GPU needs about a microsecond,
less than a sort in steps, which also needs more launches.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import on_device_of

# key = row * KEY_FACTOR mod 2**63. The factor is odd, so that keys are unique. It is 2**63 divided
# by the golden ratio, so that neighbouring rows, which product keys often read, spread evenly.
KEY_FACTOR = tl.constexpr(0x4F1BBCDCBFA53E0B)
KEY_INVERSE = tl.constexpr(pow(0x4F1BBCDCBFA53E0B, -1, 2**63))
KEY_MASK = tl.constexpr(2**63 - 1)

# references that a program places, and references that it compares them with at once (a multiple)
_OWN, _OTHERS, _WARPS = 8, 256, 4


class SortedRows(NamedTuple):
    """References to rows, sorted by the rows' keys; equal keys keep their order.

    Attributes:
        keys_L: int64 keys, ascending.
        order_L: int64, the index of each key's reference.
    """

    keys_L: Tensor
    order_L: Tensor


def sort_rows(rows_L: Tensor) -> SortedRows:
    """Sort row ids, int64, contiguous, at least one."""
    keys_L, order_L = torch.empty_like(rows_L), torch.empty_like(rows_L)
    with on_device_of(rows_L):
        _sort_rows[(triton.cdiv(len(rows_L), _OWN),)](
            rows_L,
            keys_L,
            order_L,
            len(rows_L),
            OWN=_OWN,
            OTHERS=_OTHERS,
            num_warps=_WARPS,
            num_stages=1,
        )
    return SortedRows(keys_L, order_L)


@triton.jit
def _sort_rows(
    rows_ptr, keys_ptr, order_ptr, num_references, OWN: tl.constexpr, OTHERS: tl.constexpr
):
    """A reference's place is the number of smaller keys, plus the equal keys before it.

    In tiles before its own all equal keys are before it, in later tiles none are. So one comparison
    per reference suffices there.
    """
    tl.static_assert(OTHERS % OWN == 0, "all of a program's references lie in one tile")
    first = tl.program_id(0) * OWN
    own = first + tl.arange(0, OWN)
    inside = own < num_references
    keys = key_of(tl.load(rows_ptr + own, mask=inside, other=0))
    middle = first // OTHERS * OTHERS
    # counts per lane, summed over lanes once at the end
    before = tl.zeros((OWN, OTHERS), dtype=tl.int32)
    for start in range(0, middle, OTHERS):
        others = _keys_from(rows_ptr, start + tl.arange(0, OTHERS), num_references)
        before += (others[None, :] <= keys[:, None]).to(tl.int32)
    at = middle + tl.arange(0, OTHERS)
    others = _keys_from(rows_ptr, at, num_references)
    is_earlier = (others[None, :] == keys[:, None]) & (at[None, :] < own[:, None])
    before += ((others[None, :] < keys[:, None]) | is_earlier).to(tl.int32)
    for start in range(middle + OTHERS, num_references, OTHERS):
        others = _keys_from(rows_ptr, start + tl.arange(0, OTHERS), num_references)
        before += (others[None, :] < keys[:, None]).to(tl.int32)
    place = tl.sum(before, axis=1)
    tl.store(keys_ptr + place, keys, mask=inside)
    tl.store(order_ptr + place, own.to(tl.int64), mask=inside)


@triton.jit
def _keys_from(rows_ptr, at, num_references):
    """Keys of references; past the last reference, the largest key."""
    known = at < num_references
    return tl.where(known, key_of(tl.load(rows_ptr + at, mask=known, other=0)), KEY_MASK)


@triton.jit
def key_of(rows):
    """A row's key."""
    return (rows * KEY_FACTOR) & KEY_MASK


@triton.jit
def row_of(keys):
    """The row of a key."""
    return (keys * KEY_INVERSE) & KEY_MASK
