"""Lookup and eviction of a set-associative row cache, as a Triton kernel: one program per set.

Shape suffixes: L references to rows, repeats included, S sets, W ways.

Programs need no locks: a row's set follows from its key and keys are sorted, so all references to a
set are adjacent, and the program of the first one handles the whole set. The result depends only on
the set and the requested rows, so the same calls give the same bits. Programs share only the
counts, and add to them atomically.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import on_device_of
from memory_ops.triton_kernels.sort_rows import SortedRows, row_of

# fields of a row's priority, see CacheSets; uses beyond the third do not count
MOST_USES = tl.constexpr(3)
USES_SHIFT = tl.constexpr(48)
LAST_MASK = tl.constexpr(2**48 - 1)
# larger than any number of references
NEVER = tl.constexpr(2**31 - 1)

# columns of counts
LOOKUPS = tl.constexpr(0)
REQUESTED = tl.constexpr(1)
UNIQUE = tl.constexpr(2)
MISSES = tl.constexpr(3)
PREFETCHED = tl.constexpr(4)
PREFETCHED_USED = tl.constexpr(5)
# rounded up, so that a layer's counts have the alignment that the compiler assumes
NUM_COUNTS = 8

# references of a set processed at once: most sets have one, and 16 or more spill registers
_REFERENCES = 8


class CacheSets(NamedTuple):
    """State of the cache: way w of set s is row ``s * W + w`` of the cache's memory.

    Attributes:
        tags_SW: int64 row ids, -1 for an empty way.
        priorities_SW: int64; the smallest is evicted first, 0 for an empty way. From high bits to
            low: uses since the row was placed (at most 3; evictions in the set lower them), time of
            the last request, and 1 if only hints requested the row.
    """

    tags_SW: Tensor
    priorities_SW: Tensor


class Placed(NamedTuple):
    """Places of the requested rows in the cache's memory.

    Attributes:
        places_L: int64, in the order of the references: rows of the cache's memory. If a set has no
            free way, its row gets one of L overflow rows, from ``S * W`` on, until the next call.
            Not written for a hint.
        fetch_L: int64, in the sorted order: the place to fetch the row to, or -1. Places are
            unique.
    """

    places_L: Tensor
    fetch_L: Tensor


def place_rows(
    sets: CacheSets, wanted: SortedRows, counts: Tensor, *, is_hint: bool, is_first: bool = True
) -> Placed:
    """Find the places of rows, and assign places to missing rows by evicting others.

    Never waits for the device, and branches on shapes alone, so CUDA graphs can capture it.

    Args:
        sets: the cache's state, updated in place.
        wanted: sorted references to rows.
        counts: int64 ``[NUM_COUNTS]``, incremented.
        is_hint: prefetch only: evict no row that has uses, and count no use.
        is_first: count a lookup; false for later parts of a lookup.
    """
    keys_L, order_L = wanted
    places_L, fetch_L = torch.empty_like(keys_L), torch.empty_like(keys_L)
    num_sets, num_ways = sets.tags_SW.shape
    with on_device_of(order_L):
        _place_rows[(len(order_L),)](
            keys_L,
            order_L,
            sets.tags_SW,
            sets.priorities_SW,
            places_L,
            fetch_L,
            counts,
            len(order_L),
            num_sets,
            int(is_first),
            WAYS=num_ways,
            BLOCK=_REFERENCES,
            IS_HINT=is_hint,
            # one warp, so that all lanes have read the set before any lane writes to it
            num_warps=1,
            num_stages=1,
        )
    return Placed(places_L, fetch_L)


@triton.jit
def _place_rows(
    keys_ptr,
    order_ptr,
    tags_ptr,
    priorities_ptr,
    places_ptr,
    fetch_ptr,
    counts_ptr,
    num_references,
    num_sets,
    is_first,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_HINT: tl.constexpr,
):
    """One program per reference; the program of a set's first reference handles the whole set."""
    start = tl.program_id(0).to(tl.int64)
    own_set = _set_of(tl.load(keys_ptr + start), num_sets)
    before = tl.load(keys_ptr + start - 1, mask=start > 0, other=0)
    if (start == 0) | (_set_of(before, num_sets) != own_set):
        _place_in_set(
            keys_ptr,
            order_ptr,
            tags_ptr + own_set * WAYS,
            priorities_ptr + own_set * WAYS,
            places_ptr,
            fetch_ptr,
            counts_ptr,
            start,
            own_set,
            num_references,
            num_sets,
            WAYS,
            BLOCK,
            IS_HINT,
        )
    if (start == 0) & (not IS_HINT):
        tl.atomic_add(counts_ptr + LOOKUPS, tl.cast(is_first, tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + REQUESTED, tl.cast(num_references, tl.int64), sem="relaxed")


@triton.jit
def _place_in_set(
    keys_ptr,
    order_ptr,
    tags_ptr,
    priorities_ptr,
    places_ptr,
    fetch_ptr,
    counts_ptr,
    start,
    own_set,
    num_references,
    num_sets,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_HINT: tl.constexpr,
):
    """Two passes over the set's references: find requested ways, then replace others.

    The m-th missing row, in key order, takes the unrequested way of m-th lowest priority. A hint
    takes only ways without uses, so a prediction never evicts a row that is in use.
    """
    ways = tl.arange(0, WAYS)
    tags, priorities = tl.load(tags_ptr + ways), tl.load(priorities_ptr + ways)

    wanted = tl.zeros((WAYS,), dtype=tl.int32)
    at = start + tl.arange(0, BLOCK)
    more = start < num_references
    while more:
        rows, live, _ = _references(keys_ptr, at, start, own_set, num_references, num_sets)
        wanted |= tl.max(_is_in(rows, live, tags), axis=0)
        at += BLOCK
        more = tl.sum(live.to(tl.int32), axis=0) == BLOCK

    # earlier[v, w]: way v is evicted before way w
    earlier = (priorities[:, None] < priorities[None, :]) | (
        (priorities[:, None] == priorities[None, :]) & (ways[:, None] < ways[None, :])
    )
    stays = wanted
    if IS_HINT:
        stays |= (priorities > LAST_MASK).to(tl.int32)
    rank = tl.sum((earlier & (stays[:, None] == 0)).to(tl.int32), axis=0)
    rank = tl.where(stays == 0, rank, NEVER)

    unique, misses, new_tags = 0, 0, tags
    at = start + tl.arange(0, BLOCK)
    more = start < num_references
    while more:
        rows, live, is_new = _references(keys_ptr, at, start, own_set, num_references, num_sets)
        found = _is_in(rows, live, tags)
        missing = live & (tl.max(found, axis=1) == 0)
        is_miss = (missing & is_new).to(tl.int32)
        # equal rows are adjacent and share one number
        number = misses + tl.cumsum(is_miss, axis=0) - 1
        taken = (missing[:, None] & (number[:, None] == rank[None, :])).to(tl.int32)
        has_way = tl.max(found | taken, axis=1) != 0
        place = own_set * WAYS + tl.sum((found | taken) * ways[None, :], axis=1)
        # a number is less than the set's references, so sets never share an overflow row
        overflow = tl.cast(num_sets, tl.int64) * WAYS + start + number
        place = tl.where(has_way, place, overflow)
        if not IS_HINT:
            index = tl.load(order_ptr + at, mask=live, other=0)
            tl.store(places_ptr + index, place, mask=live)
        is_fetched = (is_miss != 0) & (has_way | (not IS_HINT))
        tl.store(fetch_ptr + at, tl.where(is_fetched, place, -1), mask=live)
        is_taken = taken * is_miss[:, None]
        came = tl.sum(tl.where(is_taken != 0, rows[:, None], 0), axis=0)
        new_tags = tl.where(tl.max(is_taken, axis=0) != 0, came, new_tags)
        unique += tl.sum(is_new.to(tl.int32), axis=0)
        misses += tl.sum(is_miss, axis=0)
        at += BLOCK
        more = tl.sum(live.to(tl.int32), axis=0) == BLOCK

    is_filled = rank < misses
    tl.store(tags_ptr + ways, new_tags)
    tl.store(
        priorities_ptr + ways, _new_priorities(priorities, wanted != 0, is_filled, misses, IS_HINT)
    )
    if IS_HINT:
        filled = tl.sum(is_filled.to(tl.int64), axis=0)
        tl.atomic_add(counts_ptr + PREFETCHED, filled, sem="relaxed")
    else:
        used = tl.sum(tl.where(wanted != 0, priorities & 1, 0), axis=0)
        tl.atomic_add(counts_ptr + UNIQUE, tl.cast(unique, tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + MISSES, tl.cast(misses, tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + PREFETCHED_USED, used, sem="relaxed")


@triton.jit
def _new_priorities(priorities, wanted, is_filled, misses, IS_HINT: tl.constexpr):
    """Priorities, uses * 2**48 + last * 2 + hinted, after a lookup that replaced some ways.

    Unrequested ways lose as many uses as the most-used evicted row had. So often-used rows survive
    a scan of rows read once, and are evicted after they fall out of use. A hint that misses costs
    them one use: otherwise hints could place nothing while lookups hit every time.
    """
    uses, last = priorities >> USES_SHIFT, (priorities & LAST_MASK) >> 1
    now = (tl.max(last, axis=0) + 1) * 2
    if IS_HINT:
        kept, came = (uses << USES_SHIFT) + now + (priorities & 1), now + 1
        lost = tl.cast(misses > 0, tl.int64)
    else:
        kept, came = (tl.minimum(uses + 1, MOST_USES) << USES_SHIFT) + now, now
        lost = tl.max(tl.where(is_filled, uses, 0), axis=0)
    rest = priorities - (tl.minimum(uses, lost) << USES_SHIFT)
    return tl.where(wanted, kept, tl.where(is_filled, came, rest))


@triton.jit
def _references(keys_ptr, at, start, own_set, num_references, num_sets):
    """Rows of some sorted keys, whether each is in the set, and whether each is a new row."""
    inside = at < num_references
    keys = tl.load(keys_ptr + at, mask=inside, other=0)
    live = inside & (_set_of(keys, num_sets) == own_set)
    before = tl.load(keys_ptr + at - 1, mask=live & (at > start), other=0)
    return row_of(keys), live, live & ((at == start) | (keys != before))


@triton.jit
def _is_in(rows, live, tags):
    """1 where a way holds a reference's row, ``[references, ways]``."""
    return (live[:, None] & (rows[:, None] == tags[None, :])).to(tl.int32)


@triton.jit
def _set_of(keys, num_sets):
    """A key's set, for fewer than 2**31 sets; it increases monotonically with the key."""
    return ((keys >> 32) * num_sets) >> 31
