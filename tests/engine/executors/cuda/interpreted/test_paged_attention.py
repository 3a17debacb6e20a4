"""The attention kernels against their twin in fp64, and the twin against the model's attention."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from engine.executors.cuda.kernels import attention_kernels, paged_attention
from engine.executors.cuda.kernels.attention_launch import has_large_shared_memory
from engine.executors.cuda.kernels.paged_step import (
    QUERY_TILE,
    most_query_tiles,
    query_tiles,
    split_queries,
)
from engine.model.attention import attend
from engine.model.layout import PagedKv, TokenLayout
from tests.engine.executors.cuda.interpreted.attention_cases import attention_case
from tests.kernel_tools.planted_faults import with_fault

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# decode, a chunk whose first queries come before the last tile of keys, long chunks, padding
# without tokens
MIXED = {"counts": (1, 9, 40, 1, 0, 33), "lengths": (70, 70, 100, 1, 9, 64)}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_steps(dtype, fp8):
    attention_case(**MIXED, dtype=dtype, fp8=fp8).check()
    attention_case(**MIXED, dtype=dtype, fp8=fp8, num_shared=3).check(num_splits=3)


def test_the_twin_computes_the_attention_of_the_model():
    case = attention_case(**MIXED, dtype=torch.float64, num_shared=2)
    starts = tuple(case.step.query_starts_S1.tolist())
    table_SB = case.step.block_table_PB[case.step.seats_S]
    paged = PagedKv(torch.empty(0, dtype=torch.int64), table_SB, MIXED["lengths"])
    layout = TokenLayout(torch.empty(0, dtype=torch.int64), starts, paged)
    model_THE = attend(case.q_THE, case.q_THE, case.q_THE, layout, case.kv_blocks)
    live = slice(starts[-1])
    torch.testing.assert_close(case.exact()[live], model_THE[live])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_keeps_the_dtype_of_the_queries(dtype):
    case = attention_case(**MIXED, dtype=dtype)
    out = torch.full_like(case.q_THE, torch.nan)
    step, kv_blocks = case.step, case.kv_blocks
    paged_attention.paged_attention_reference(
        case.q_THE, kv_blocks, step, num_splits=1, out_THE=out
    )
    torch.testing.assert_close(out, case.exact().to(dtype), equal_nan=True)


@pytest.mark.parametrize("length", [1, 16, 17, 32, 33, 64, 65, 500])
@pytest.mark.parametrize("count", [1, 2, 32, 33])
def test_contexts_around_the_borders_of_tiles(count, length):
    attention_case([min(count, length)], [length]).check(num_splits=2)


@pytest.mark.parametrize(
    ("group", "num_splits"),
    [(4, 4), *((n, m) for n in (1, 2, 3, 5, 7, 8) for m in (1, 4))],
)
def test_short_chunks_beside_tokens_and_long_chunks(group, num_splits):
    # around the limits of all groups
    counts, lengths = (16, 2, 1, 17, 8, 9, 3), (16, 70, 40, 90, 130, 133, 300)
    attention_case(counts, lengths, num_heads=group, num_kv_heads=1).check(num_splits)


@pytest.mark.parametrize("num_splits", [1, 4, 16])
def test_long_contexts(num_splits):
    few = {"num_heads": 2, "num_kv_heads": 1, "dtype": torch.bfloat16}
    attention_case([1, 1, 1], [5000, 3, 4097], **few).check(num_splits)


@pytest.mark.parametrize(
    ("group", "num_splits"),
    [(4, 4), (1, 4), (4, 1), (8, 4), (4, 16)],
)
def test_short_chunks_at_the_end_of_long_contexts(group, num_splits):
    few = {"num_heads": group, "num_kv_heads": 1, "dtype": torch.bfloat16}
    attention_case([7, 3, 16, 1], [5000, 3, 4097, 50], **few).check(num_splits)


def test_a_chunk_at_the_end_of_a_long_prompt():
    attention_case([40], [5000], num_heads=2, num_kv_heads=1, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("num_splits", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_more_splits_than_tiles_of_keys(length, num_splits):
    attention_case([1, 1], [length, 1], head_dim=64).check(num_splits)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 17])
def test_groups(group):
    attention_case((1, 35), (40, 50), num_heads=2 * group, num_kv_heads=2).check(num_splits=2)


@pytest.mark.parametrize("head_dim", [2, 16, 30, 32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(head_dim, dtype):
    attention_case((1, 35), (40, 50), head_dim=head_dim, dtype=dtype).check(num_splits=2)


@pytest.mark.parametrize("block_size", [1, 3, 8, 32, 100])
def test_block_sizes(block_size):
    attention_case((1, 35), (140, 50), block_size=block_size, num_shared=4).check(num_splits=2)


def test_no_token_and_no_sequence():
    assert attention_case([], []).run().isnan().all()
    assert attention_case([0, 0], [20, 20]).run(num_splits=2).isnan().all()


def test_only_chunks_of_prompts():
    attention_case((2, 64, 3), (64, 64, 3)).check(num_splits=4)


def test_padding_of_a_decode_step_repeats_the_first_sequence_bit_by_bit():
    case = attention_case((1, 1), (300, 80), dtype=torch.bfloat16)
    q_THE = case.q_THE.clone()
    q_THE[2:] = q_THE[0]
    first = torch.zeros(3, dtype=torch.int64)
    step = replace(
        case.step,
        query_starts_S1=torch.arange(6),
        context_lengths_S=torch.cat((case.step.context_lengths_S, 300 + first)),
        seats_S=torch.cat((case.step.seats_S, case.step.seats_S[first])),
    )
    for num_splits in (1, 4):
        plain = case.run(num_splits)
        padded = replace(case, q_THE=q_THE, step=step).run(num_splits)
        assert torch.equal(padded[:2], plain[:2])
        assert torch.equal(padded[2:], plain[:1].expand(3, -1, -1))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_padded_sequence_without_context_gives_zeros(num_splits):
    case = attention_case((1, 1), (40, 20))
    lengths_S = torch.tensor([40, 0])
    case = replace(case, step=replace(case.step, context_lengths_S=lengths_S))
    case.check(num_splits)
    assert torch.equal(case.run(num_splits)[1], torch.zeros(4, 32))


def test_scores_of_any_size():
    # exp2 of these scores overflows without the maxima
    case = attention_case((1, 20), (200, 100))
    case.q_THE.mul_(1e4)
    case.check(num_splits=4)


def test_every_fp8_code_is_read_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 2, 128)
    codes[codes & 0x7F == 0x7F] = 0
    case = attention_case([1], [1], num_heads=2, head_dim=128, fp8=True, dtype=torch.bfloat16)
    block = case.step.block_table_PB[case.step.seats_S[0], 0]
    case.kv_blocks[block, 1, :, 0] = codes[0]
    # the only key has all the weight
    assert torch.equal(case.run()[0], codes[0].view(torch.float8_e4m3fn).bfloat16())


@given(
    spans=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 90)), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 6), st.integers(1, 3)),
    head_dim=st.sampled_from([8, 24, 64]),
    block_size=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    fp8=st.booleans(),
    num_splits=st.integers(1, 5),
)
def test_ragged_steps(spans, heads, head_dim, block_size, dtype, fp8, num_splits):
    group, num_kv_heads = heads
    attention_case(
        [count for count, _ in spans],
        [max(1, count + before) for count, before in spans],
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        fp8=fp8,
        num_shared=2,
    ).check(num_splits)


def full_check() -> None:
    for fp8 in (False, True):
        attention_case(**MIXED, head_dim=24, num_heads=6, fp8=fp8).check()
        attention_case(**MIXED, head_dim=24, num_heads=6, fp8=fp8).check(num_splits=3)


FAULTS = {
    "a token does not attend to itself": (
        "keys[None, :] <= positions",
        "keys[None, :] < positions",
    ),
    "a token attends to the next one": ("<= positions[:, None]", "<= positions[:, None] + 1"),
    "a slot after the context is read": ("(keys < length)[:, None]", "(keys <= length)[:, None]"),
    "the last block id is not read": ("mask=ahead < length,", "mask=ahead < length - KEYS,"),
    "block ids are not read ahead": ("ahead = keys + KEYS", "ahead = keys"),
    "sums ignore a new maximum": ("sums * shrink +", "sums +"),
    "values ignore a new maximum": ("outs *= shrink[:, None]", "outs *= 1.0"),
    "the last tile belongs to no split": (
        "(split + 1) * share, num_tiles)",
        "(split + 1) * share, num_tiles - 1)",
    ),
    "shares are rounded down": ("tl.cdiv(num_tiles, NUM_SPLITS)", "(num_tiles // NUM_SPLITS)"),
    "a split is computed twice": ("        split * share,", "        (split // 2) * share,"),
    "splits are combined without maxima": ("tl.exp2(maxima - maximum)", "tl.exp2(maxima * 0)"),
    "values of splits without keys are used": (
        "mask = (sums > 0)[:, :, None] &",
        "mask = mask[:, :, None] &",
    ),
    "queries before all keys of a split": ("_LEAST_SCORE, tl.float32", 'float("-inf"), tl.float32'),
    "a query of a short chunk attends to later ones": (
        "length - count + queries,",
        "length - 1 + queries * 0,",
    ),
    "only the first query of a chunk is combined": ("(queries < count)[:", "(queries < 1)[:"),
    "parts of a chunk's queries overlap": (
        "parts = (tokens * (",
        "parts = ((token + rows * 0) * (",
    ),
    "a sequence's seat is its number": (
        "table_ptr + tl.load(seats_ptr + sequence) *",
        "table_ptr + sequence *",
    ),
    "a tile with later keys is not masked": (
        "(first_position + 1) // KEYS",
        "(first_position + KEYS) // KEYS",
    ),
    "a tile writes to the next sequence": ("(queries < count) &", "(queries <= count) &"),
    "prefill ignores the start of its tile": ("first_query + rows //", "rows //"),
    "fp8 values are not scaled": ("outs *= kv_factor(kv_ptr)\n", "outs *= 1.0\n"),
    "fp8 scores are not scaled in prefill": (
        "log2_scale = scale * kv_factor(kv_ptr)\n    kv_ptr +=",
        "log2_scale = scale\n    kv_ptr +=",
    ),
}


def test_every_path_passes_without_a_fault():
    full_check()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch, tmp_path):
    faulty = with_fault(attention_kernels, *FAULTS[fault], tmp_path)
    for name in ("split_context", "combine", "prefill"):
        monkeypatch.setattr(paged_attention, name, getattr(faulty, name))
    with pytest.raises((AssertionError, InterpreterError)):
        full_check()


def test_tiles_hold_the_queries_of_sequences_with_several():
    tiles_I2 = query_tiles([1, QUERY_TILE + 1, 0, 17, 16], 4, 5)
    assert tiles_I2.tolist() == [[1, 0], [1, QUERY_TILE], [3, 0], [-1, 0], [-1, 0]]
    assert query_tiles([1, 16], 4, 0).shape == (0, 2)
    limits = {1: 16, 2: 16, 3: 16, 4: 16, 5: 8, 8: 8, 9: 4, 16: 4, 17: 2, 32: 2, 33: 1, 100: 1}
    assert {group: split_queries(group) for group in limits} == limits
    with pytest.raises(ValueError, match="num_tiles: 2 is less than the 3 tiles"):
        query_tiles([QUERY_TILE + 1, 17], 4, 2)


@given(st.lists(st.integers(0, 4 * QUERY_TILE), max_size=8))
def test_tiles_never_exceed_their_upper_limit(counts):
    most = most_query_tiles(sum(counts), len(counts))
    # with a group this large no context of several queries is split
    assert (query_tiles(counts, 64, most)[:, 0] >= -1).all()


def test_cards_with_much_shared_memory(monkeypatch):
    properties = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    # AMD, a consumer card, A100, H100
    for limit in (None, 99, 163, 227):
        if limit is not None:
            properties.shared_memory_per_block_optin = limit * 2**10
        assert has_large_shared_memory(torch.device("cuda", 0)) == (limit == 227)
    assert not has_large_shared_memory(torch.device("cpu"))


def test_unsupported_operands_are_refused():
    case = attention_case((1, 1), (4, 4))
    for changed, message in (
        ({"q_THE": case.q_THE.bfloat16()}, "kv_blocks: expected torch.bfloat16 or torch.uint8"),
        ({"kv_blocks": case.kv_blocks.repeat(1, 1, 3, 1, 1)}, "4 heads are not a multiple of 6"),
        ({"kv_blocks": case.kv_blocks[..., :30]}, "q: expected heads of 30 values"),
        ({"kv_blocks": case.kv_blocks.transpose(2, 3)}, "q|kv_blocks: expected contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(case, **changed).run()
    with pytest.raises(ValueError, match="num_splits: must be at least 1, not 0"):
        case.run(num_splits=0)
    with pytest.raises(ValueError, match="out: expected torch.float32"):
        paged_attention.paged_attention(
            case.q_THE, case.kv_blocks, case.step, num_splits=1, out_THE=case.q_THE.half()
        )
