"""Triton kernels of attention over paged KV blocks: split contexts, prefill, their common loop."""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from engine.executors.cuda.kernels.kv_formats import kv_factor, kv_values

# slices of the step's input buffer: a change of their alignment must not compile a kernel again
_STEP_POINTERS = ["tiles_ptr", "query_starts_ptr", "lengths_ptr", "seats_ptr", "table_ptr"]
# finite: a query can come before all keys of a split
_LEAST_SCORE = tl.constexpr(-1e30)


@triton.jit
def _attend_tiles(
    q,
    maxima,
    sums,
    outs,
    positions,
    kv_ptr,
    block_ids_ptr,
    first,
    last,
    length,
    scale,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
):
    """Attend to the tiles ``[first, last)`` of one KV head; return new (maxima, sums, outs).

    With scores s = q k^T of the keys so far, row r of the state is
    maxima[r] = max(s[r]), sums[r] = sum(p[r]), outs[r] = p[r] v,
    where p[r] = exp2(scale * (s[r] - maxima[r])).

    Args:
        q: ``[rows, lanes]``, 0 in lanes from HEAD_DIM on.
        maxima: finite if ``positions`` of a row can be before all keys.
        positions: the last key that each row attends to.
        kv_ptr: the head's first key in block 0.
        block_ids_ptr: the block ids of the sequence.
        length: keys from here on are not read.
        MASKED: whether a key of these tiles can be past ``positions`` or ``length``.
        KEYS: keys per tile.
        VALUE_OFFSET: elements from a key to its value.
    """
    lanes = tl.arange(0, q.shape[1])
    keys = first * KEYS + tl.arange(0, KEYS)
    blocks = tl.load(block_ids_ptr + keys // BLOCK_SIZE, mask=keys < length, other=0)
    for tile in range(first, last):
        keys = tile * KEYS + tl.arange(0, KEYS)
        starts = blocks.to(tl.int64) * BLOCK_STRIDE + (keys % BLOCK_SIZE) * HEAD_DIM
        # one tile ahead, so that loads of keys never wait for a load of block ids
        ahead = keys + KEYS
        blocks = tl.load(block_ids_ptr + ahead // BLOCK_SIZE, mask=ahead < length, other=0)
        places = kv_ptr + starts[:, None] + lanes[None, :]
        if MASKED:
            mask = (keys < length)[:, None] & (lanes < HEAD_DIM)[None, :]
            k, v = tl.load(places, mask, other=0), tl.load(places + VALUE_OFFSET, mask, other=0)
        elif q.shape[1] == HEAD_DIM:
            k, v = tl.load(places), tl.load(places + VALUE_OFFSET)
        else:
            mask = (lanes < HEAD_DIM)[None, :]
            k, v = tl.load(places, mask, other=0), tl.load(places + VALUE_OFFSET, mask, other=0)
        scores = tl.dot(q, tl.trans(kv_values(k, q.dtype)), input_precision="ieee")
        if MASKED:
            scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        new_maxima = tl.maximum(maxima, tl.max(scores, axis=1))
        p = tl.exp2(scores * scale - (new_maxima * scale)[:, None])
        shrink = tl.exp2((maxima - new_maxima) * scale)
        sums = sums * shrink + tl.sum(p, axis=1)
        outs *= shrink[:, None]
        outs = tl.dot(p.to(q.dtype), kv_values(v, q.dtype), outs, input_precision="ieee")
        maxima = new_maxima
    return maxima, sums, outs


@triton.jit(do_not_specialize_on_alignment=_STEP_POINTERS)
def split_context(
    q_ptr,
    kv_ptr,
    out_ptr,
    parts_ptr,
    part_values_ptr,
    query_starts_ptr,
    lengths_ptr,
    seats_ptr,
    table_ptr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """out[t] = softmax(q[t] k^T * scale) v for tokens t of sequences with at most QUERIES of them.

    One program per sequence, KV head and split. Its rows are the sequence's queries, each with the
    heads of the group. A split attends to an equal share of the tiles of keys. If there are more
    splits than one, it writes its state for ``combine``.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    token = tl.load(query_starts_ptr + sequence)
    count = (tl.load(query_starts_ptr + sequence + 1) - token).to(tl.int32)
    if count == 0 or count > QUERIES:
        return
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    rows, lanes = tl.arange(0, ROWS), tl.arange(0, LANES)
    # the compiler knows that a single query is number 0
    queries = rows // GROUP % QUERIES
    tokens, heads = token + queries, kv_head * GROUP + rows - queries * GROUP
    live = rows < count * GROUP
    mask = live[:, None] & (lanes < HEAD_DIM)[None, :]
    q_places = (tokens * Q_STRIDE + heads * HEAD_DIM)[:, None] + lanes[None, :]
    q = tl.load(q_ptr + q_places, mask=mask, other=0.0)
    num_tiles = tl.cdiv(length, KEYS)
    share = tl.cdiv(num_tiles, NUM_SPLITS)
    log2_scale = scale * kv_factor(kv_ptr)
    maxima, sums, outs = _attend_tiles(
        q,
        tl.full((ROWS,), _LEAST_SCORE, tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, LANES), tl.float32),
        length - count + queries,
        kv_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM),
        table_ptr + tl.load(seats_ptr + sequence) * TABLE_STRIDE,
        split * share,
        tl.minimum((split + 1) * share, num_tiles),
        length,
        log2_scale,
        MASKED=True,
        KEYS=KEYS,
        HEAD_DIM=HEAD_DIM,
        BLOCK_SIZE=BLOCK_SIZE,
        BLOCK_STRIDE=BLOCK_STRIDE,
        VALUE_OFFSET=NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM,
    )
    outs *= kv_factor(kv_ptr)
    if NUM_SPLITS == 1:
        outs /= tl.where(sums > 0, sums, 1.0)[:, None]
        out_places = (tokens * OUT_STRIDE + heads * HEAD_DIM)[:, None] + lanes[None, :]
        tl.store(out_ptr + out_places, outs.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        parts = (tokens * (NUM_KV_HEADS * GROUP) + heads) * NUM_SPLITS + split
        tl.store(parts_ptr + parts * 2, maxima * log2_scale, mask=live)
        tl.store(parts_ptr + parts * 2 + 1, sums, mask=live)
        part_places = parts[:, None] * HEAD_DIM + lanes[None, :]
        tl.store(part_values_ptr + part_places, outs, mask=mask & (sums > 0)[:, None])


@triton.jit(do_not_specialize_on_alignment=["query_starts_ptr"])
def combine(
    parts_ptr,
    part_values_ptr,
    out_ptr,
    query_starts_ptr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    QUERIES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """out[t] = sum of exp2(maxima[i]) * outs[i] / sum of exp2(maxima[i]) * sums[i] over parts i.

    One program per sequence and query head. Parts without keys have a sum of 0 and no values.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(query_starts_ptr + sequence)
    count = tl.load(query_starts_ptr + sequence + 1) - token
    if count == 0 or count > QUERIES:
        return
    queries, splits, lanes = tl.arange(0, QUERIES), tl.arange(0, SPLITS), tl.arange(0, LANES)
    live = (queries < count)[:, None]
    first_part = (token * tl.num_programs(1) + head) * NUM_SPLITS
    parts_ptr, part_values_ptr = parts_ptr + first_part * 2, part_values_ptr + first_part * HEAD_DIM
    first_parts = (queries * (tl.num_programs(1) * NUM_SPLITS))[:, None]
    parts, mask = first_parts + splits[None, :], live & (splits < NUM_SPLITS)[None, :]
    maxima = tl.load(parts_ptr + parts * 2, mask=mask, other=float("-inf"))
    maximum = tl.max(maxima, axis=1)[:, None]
    total = tl.zeros((QUERIES,), tl.float32)
    outs = tl.zeros((QUERIES, LANES), tl.float32)
    for start in tl.static_range(0, NUM_SPLITS, AT_ONCE):
        splits = start + tl.arange(0, AT_ONCE)
        parts, mask = first_parts + splits[None, :], live & (splits < NUM_SPLITS)[None, :]
        sums = tl.load(parts_ptr + parts * 2 + 1, mask=mask, other=0.0)
        maxima = tl.load(parts_ptr + parts * 2, mask=mask, other=float("-inf"))
        weights = tl.where(sums > 0, tl.exp2(maxima - maximum), 0.0)
        total += tl.sum(weights * sums, axis=1)
        mask = (sums > 0)[:, :, None] & (lanes < HEAD_DIM)[None, None, :]
        places = parts[:, :, None] * HEAD_DIM + lanes[None, None, :]
        values = tl.load(part_values_ptr + places, mask=mask, other=0.0)
        outs += tl.sum(weights[:, :, None] * values, axis=1)
    outs = (outs / tl.where(total > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    places = ((token + queries) * OUT_STRIDE + head * HEAD_DIM)[:, None] + lanes[None, :]
    tl.store(out_ptr + places, outs, mask=live & (lanes < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize_on_alignment=_STEP_POINTERS)
def prefill(
    q_ptr,
    kv_ptr,
    out_ptr,
    tiles_ptr,
    query_starts_ptr,
    lengths_ptr,
    seats_ptr,
    table_ptr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """out[t] = softmax(q[t] k^T * scale) v for tiles of tokens t of the same sequence.

    One program per tile and HEADS query heads of a group. Its rows are the tile's queries, each
    with these heads.
    """
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    ROWS: tl.constexpr = QUERIES * HEADS
    kv_head = (tl.program_id(0) // PARTS).to(tl.int64)
    # the last tile of a long prompt attends to the most keys, so it starts first
    tile = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    sequence = tl.load(tiles_ptr + tile * 2)
    if sequence < 0:
        return
    first_query = tl.load(tiles_ptr + tile * 2 + 1).to(tl.int32)
    token = tl.load(query_starts_ptr + sequence)
    count = (tl.load(query_starts_ptr + sequence + 1) - token).to(tl.int32)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    rows, lanes = tl.arange(0, ROWS), tl.arange(0, LANES)
    queries = first_query + rows // HEADS
    head_in_group = (tl.program_id(0) % PARTS) * HEADS + rows % HEADS
    tokens, heads = token + queries, kv_head * GROUP + head_in_group
    live = (queries < count) & (head_in_group < GROUP)
    mask = live[:, None] & (lanes < HEAD_DIM)[None, :]
    q_places = (tokens * Q_STRIDE + heads * HEAD_DIM)[:, None] + lanes[None, :]
    q = tl.load(q_ptr + q_places, mask=mask, other=0.0)
    first_position = length - count + first_query
    positions = length - count + queries
    end = tl.minimum(first_position + QUERIES, length)
    # tiles of keys that all queries attend to
    num_whole = (first_position + 1) // KEYS
    log2_scale = scale * kv_factor(kv_ptr)
    kv_ptr += kv_head * (BLOCK_SIZE * HEAD_DIM)
    table_ptr += tl.load(seats_ptr + sequence) * TABLE_STRIDE
    maxima = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    outs = tl.zeros((ROWS, LANES), tl.float32)
    for masked in tl.static_range(2):
        maxima, sums, outs = _attend_tiles(
            q,
            maxima,
            sums,
            outs,
            positions,
            kv_ptr,
            table_ptr,
            num_whole if masked else 0,
            tl.cdiv(end, KEYS) if masked else num_whole,
            end,
            log2_scale,
            MASKED=masked == 1,
            KEYS=KEYS,
            HEAD_DIM=HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            BLOCK_STRIDE=BLOCK_STRIDE,
            VALUE_OFFSET=NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM,
        )
    outs *= kv_factor(kv_ptr) / sums[:, None]
    out_places = (tokens * OUT_STRIDE + heads * HEAD_DIM)[:, None] + lanes[None, :]
    tl.store(out_ptr + out_places, outs.to(out_ptr.dtype.element_ty), mask=mask)
