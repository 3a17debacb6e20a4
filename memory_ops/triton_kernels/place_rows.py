"""Where a set-associative cache keeps which rows, as a Triton kernel: one program a set.

Shape suffixes: L references to rows, each row repeated as often as it is read, S sets, W ways.

What no two programs may touch at once, they cannot: a row's set follows from its key, keys are
sorted, so all references to a set lie side by side, and the one program that begins there handles
them all. Its result depends on nothing but the set and the rows asked for: the same calls leave the
same bits. Only counts are shared, and added to atomically.
"""

# triton and with it its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import on_device_of
from memory_ops.triton_kernels.sort_rows import SortedRows, row_of

# of what a row is worth, see CacheSets; a use beyond the third says no more
MOST_USES = tl.constexpr(3)
USES_SHIFT = tl.constexpr(48)
LAST_MASK = tl.constexpr(2**48 - 1)
# more than there are references
NEVER = tl.constexpr(2**31 - 1)

# columns of counts
LOOKUPS = tl.constexpr(0)
REQUESTED = tl.constexpr(1)
UNIQUE = tl.constexpr(2)
MISSES = tl.constexpr(3)
PREFETCHED = tl.constexpr(4)
PREFETCHED_USED = tl.constexpr(5)
# columns unused: a layer's counts are aligned, as the compiler is told that they are
NUM_COUNTS = 8

# references of a set that are taken at once: most sets have one, and from 16 on registers spill
_REFERENCES = 8


class CacheSets(NamedTuple):
    """Which rows stand where: way w of set s is row ``s * W + w`` of the cache's memory.

    Attributes:
        tags_SW: int64; the row that stands there, -1 for none.
        worths_SW: int64; how often it was used since it came (to a limit, and less after each look
            for room), then when it was last wanted, then whether only a hint did so far. The least
            goes first. 0 where there is no row.
    """

    tags_SW: Tensor
    worths_SW: Tensor


class Placed(NamedTuple):
    """Where references find their rows.

    Attributes:
        places_L: int64, in the order of the references: rows of the cache's memory. A row whose set
            has no way left has one of L places after the sets' own, from ``S * W`` on, until the
            next references are placed. Not written for a hint.
        fetch_L: int64, in the sorted order: the place to which the row has to be fetched, or
            -1. No place twice.
    """

    places_L: Tensor
    fetch_L: Tensor


def place_rows(
    sets: CacheSets, wanted: SortedRows, counts: Tensor, *, is_hint: bool, is_first: bool = True
) -> Placed:
    """Find places for rows, in place of others where they are not there yet.

    Never waits for the device, and branches on shapes alone, so it can be captured in a graph.

    Args:
        sets: what is where; changed.
        wanted: references to rows.
        counts: int64 ``[NUM_COUNTS]``, added to.
        is_hint: nothing is read yet: no row that has uses makes way, and no use is counted.
        is_first: count a lookup; false for the later parts of one.
    """
    keys_L, order_L = wanted
    places_L, fetch_L = torch.empty_like(keys_L), torch.empty_like(keys_L)
    num_sets, num_ways = sets.tags_SW.shape
    with on_device_of(order_L):
        _place_rows[(len(order_L),)](
            keys_L,
            order_L,
            sets.tags_SW,
            sets.worths_SW,
            places_L,
            fetch_L,
            counts,
            len(order_L),
            num_sets,
            int(is_first),
            WAYS=num_ways,
            BLOCK=_REFERENCES,
            IS_HINT=is_hint,
            # one warp: it has read a set in all its lanes before it writes to it in any
            num_warps=1,
            num_stages=1,
        )
    return Placed(places_L, fetch_L)


@triton.jit
def _place_rows(
    keys_ptr,
    order_ptr,
    tags_ptr,
    worths_ptr,
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
    """One program a reference, of which those that begin a set's work, for all of the set."""
    start = tl.program_id(0).to(tl.int64)
    own_set = _set_of(tl.load(keys_ptr + start), num_sets)
    before = tl.load(keys_ptr + start - 1, mask=start > 0, other=0)
    if (start == 0) | (_set_of(before, num_sets) != own_set):
        _place_in_set(
            keys_ptr,
            order_ptr,
            tags_ptr + own_set * WAYS,
            worths_ptr + own_set * WAYS,
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
    worths_ptr,
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
    """Twice over the set's references: which ways are wanted, then which of the others give way.

    The m-th missing row, as keys go, takes the m-th least worth of the ways that nobody wants. A
    hint has those alone that have no use left: a guess costs no row that is known to be used.
    """
    ways = tl.arange(0, WAYS)
    tags, worths = tl.load(tags_ptr + ways), tl.load(worths_ptr + ways)

    wanted = tl.zeros((WAYS,), dtype=tl.int32)
    at = start + tl.arange(0, BLOCK)
    more = start < num_references
    while more:
        rows, live, _ = _references(keys_ptr, at, start, own_set, num_references, num_sets)
        wanted |= tl.max(_is_in(rows, live, tags), axis=0)
        at += BLOCK
        more = tl.sum(live.to(tl.int32), axis=0) == BLOCK

    # [way that goes earlier, way]
    earlier = (worths[:, None] < worths[None, :]) | (
        (worths[:, None] == worths[None, :]) & (ways[:, None] < ways[None, :])
    )
    stays = wanted
    if IS_HINT:
        stays |= (worths > LAST_MASK).to(tl.int32)
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
        # equal rows are neighbours, and have one number
        number = misses + tl.cumsum(is_miss, axis=0) - 1
        taken = (missing[:, None] & (number[:, None] == rank[None, :])).to(tl.int32)
        has_way = tl.max(found | taken, axis=1) != 0
        place = own_set * WAYS + tl.sum((found | taken) * ways[None, :], axis=1)
        # a number is less than the set's references, so this place is in their part of all L
        beside = tl.cast(num_sets, tl.int64) * WAYS + start + number
        place = tl.where(has_way, place, beside)
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
    tl.store(worths_ptr + ways, _new_worths(worths, wanted != 0, is_filled, misses, IS_HINT))
    if IS_HINT:
        filled = tl.sum(is_filled.to(tl.int64), axis=0)
        tl.atomic_add(counts_ptr + PREFETCHED, filled, sem="relaxed")
    else:
        used = tl.sum(tl.where(wanted != 0, worths & 1, 0), axis=0)
        tl.atomic_add(counts_ptr + UNIQUE, tl.cast(unique, tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + MISSES, tl.cast(misses, tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + PREFETCHED_USED, used, sem="relaxed")


@triton.jit
def _new_worths(worths, wanted, is_filled, misses, IS_HINT: tl.constexpr):
    """uses * 2**48 + last * 2 + hinted, after a lookup that wanted some and filled other ways.

    Who stays unwanted loses as many uses as the most used of those that went had: what was used
    often stays while much is read once, and goes when it is no longer used. Of a hint that looked
    for room, one use: hints find room again where lookups find all they want.
    """
    uses, last = worths >> USES_SHIFT, (worths & LAST_MASK) >> 1
    now = (tl.max(last, axis=0) + 1) * 2
    if IS_HINT:
        kept, came = (uses << USES_SHIFT) + now + (worths & 1), now + 1
        lost = tl.cast(misses > 0, tl.int64)
    else:
        kept, came = (tl.minimum(uses + 1, MOST_USES) << USES_SHIFT) + now, now
        lost = tl.max(tl.where(is_filled, uses, 0), axis=0)
    rest = worths - (tl.minimum(uses, lost) << USES_SHIFT)
    return tl.where(wanted, kept, tl.where(is_filled, came, rest))


@triton.jit
def _references(keys_ptr, at, start, own_set, num_references, num_sets):
    """The rows at some places of the sorted keys, which are of the set, and which come anew."""
    inside = at < num_references
    keys = tl.load(keys_ptr + at, mask=inside, other=0)
    live = inside & (_set_of(keys, num_sets) == own_set)
    before = tl.load(keys_ptr + at - 1, mask=live & (at > start), other=0)
    return row_of(keys), live, live & ((at == start) | (keys != before))


@triton.jit
def _is_in(rows, live, tags):
    """1 where a reference's row stands in a way, ``[references, ways]``."""
    return (live[:, None] & (rows[:, None] == tags[None, :])).to(tl.int32)


@triton.jit
def _set_of(keys, num_sets):
    """A key's set, of any number of sets below 2**31; it never falls as keys rise."""
    return ((keys >> 32) * num_sets) >> 31
