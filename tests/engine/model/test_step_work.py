"""The least bytes and operations of a step, counted by hand."""

import pytest

from engine.model.config import MemoryConfig
from engine.model.flops import forward_flops
from engine.model.grouped_weights import GroupFormat
from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork, StepWork
from tests.models import feed_forward_changes, tiny_config

# weights of a tiny model's layer: queries and outputs, keys and values, feed-forward, two norms
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
LAYERS = 2 * LAYER + 32
NORMS = 2 * 2 * 32 + 32
HEAD = 260 * 32
# bytes of a token's keys and values in bf16, in two layers
KV_BYTES = 2 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_decode_step_reads_all_weights_once_and_every_context(tied):
    work = ModelWork(tiny_config(tie_embeddings=tied), itemsize=2, row_bytes=0)
    step = work.of([Chunk(9, 1), Chunk(19, 1)], num_logits=2)
    assert step.num_bytes == 2 * (LAYERS + HEAD) + 30 * KV_BYTES
    # 4 heads of 8 in 2 layers; 10 and 20 positions
    assert step.flops == 2 * 2 * (LAYERS - NORMS + HEAD) + 4 * (10 + 20) * 2 * 4 * 8


def test_weights_in_groups_are_fewer_bytes_and_integer_operations():
    formats = {"model.layers.1.mlp.up_proj": GroupFormat(4), "lm_head": GroupFormat(8)}
    dense = ModelWork(tiny_config(), itemsize=2, row_bytes=0)
    grouped = ModelWork(tiny_config(), itemsize=2, row_bytes=0, formats=formats)
    chunks = [Chunk(9, 1)] * 3
    before, after = dense.of(chunks, 2), grouped.of(chunks, 2)
    up = 32 * 48
    # 48 and 260 outputs with one group each
    assert before.num_bytes - after.num_bytes == 2 * (up + HEAD) - (48 * 18 + 260 * 34)
    assert after.integer_ops == 2 * (3 * up + 2 * HEAD)
    assert after.flops + after.integer_ops == before.flops and before.integer_ops == 0


def test_only_the_last_token_of_a_prompt_needs_the_head():
    work = ModelWork(tiny_config(), itemsize=4, row_bytes=0)
    first, last = work.of([Chunk(0, 3)], num_logits=0), work.of([Chunk(3, 2)], num_logits=1)
    assert first.num_bytes == 4 * LAYERS + 3 * 2 * KV_BYTES
    assert first.flops == 2 * 3 * (LAYERS - NORMS) + 4 * (1 + 2 + 3) * 2 * 4 * 8
    assert last.num_bytes == 4 * (LAYERS + HEAD) + 5 * 2 * KV_BYTES
    assert last.flops == 2 * 2 * (LAYERS - NORMS) + 2 * HEAD + 4 * (4 + 5) * 2 * 4 * 8


def test_memory_layers_read_no_row_twice():
    memory = MemoryConfig(num_heads=2, num_subkeys=8, top_k=3, query_dim=8, value_dim=32)
    config = tiny_config(feed_forward=("dense", "pkm"), memory=memory)
    rows, none = (ModelWork(config, itemsize=2, row_bytes=number) for number in (48, 0))
    for tokens, read in ((1, 6), (10, 60), (11, 64)):
        chunks = [Chunk(5, 1)] * tokens
        with_rows, without = rows.of(chunks, tokens), none.of(chunks, tokens)
        assert with_rows.num_bytes - without.num_bytes == 48 * read
        assert with_rows.flops == without.flops


def test_keys_and_values_in_int8_take_fewer_bytes():
    plain, small = (
        ModelWork(tiny_config(head_dim=64), itemsize=2, row_bytes=0, kv_dtype=dtype)
        for dtype in ("auto", "int8")
    )
    chunks = [Chunk(10, 1)]
    saved = plain.of(chunks, 1).num_bytes - small.of(chunks, 1).num_bytes
    assert saved == 11 * 2 * 2 * 2 * (128 - 68)  # keys and values of two layers with two heads


def test_peer_reads_two_tables_and_a_mixture_only_the_chosen_experts():
    peer = tiny_config(**feed_forward_changes("dense", "peer"))
    rows, none = (ModelWork(peer, itemsize=2, row_bytes=number) for number in (48, 0))
    chunks = [Chunk(5, 1)]
    assert rows.of(chunks, 1).num_bytes - none.of(chunks, 1).num_bytes == 2 * 48 * 6
    config = tiny_config(**feed_forward_changes("dense", "moe"))
    work = ModelWork(config, itemsize=2, row_bytes=0).of(chunks, 1)
    expert, router = 3 * 32 * 24, 5 * 32
    own = LAYERS - 3 * 32 * 48 + router + 2 * expert + HEAD
    assert work.num_bytes == 2 * own + 6 * KV_BYTES
    assert work.flops == sum(
        count for part, count in forward_flops(config, 6).items() if part != "scoring"
    )


def test_products_and_attention_take_turns():
    work = ModelWork(tiny_config(), 2, 0)
    chunks, limits = [Chunk(3, 2), Chunk(9, 1)], MachineLimits(gb_per_s=1e-6, gflops=1e-3)
    attention = work.attention(chunks)
    # all context tokens are read, and each token attends to itself and all before it
    assert attention.num_bytes == 15 * KV_BYTES
    whole, products = work.of(chunks, 2), work.products(3, 2)
    assert whole.flops - products.flops == attention.flops
    seconds = products.least_seconds(limits) + attention.least_seconds(limits)
    assert work.seconds_in_turn(chunks, 2, limits) == seconds >= whole.least_seconds(limits)


def test_each_micro_batch_reads_the_layers_but_not_the_head():
    work = ModelWork(tiny_config(), 2, 0)
    chunks = [Chunk(0, 5)]
    reading = MachineLimits(gb_per_s=1e-9, gflops=1e9)
    seconds = [work.seconds_in_turn(chunks, 1, reading, count) for count in (1, 2, 4)]
    assert seconds == pytest.approx([seconds[0] + n * 2 * LAYERS for n in (0, 1, 3)])
    # products take as long in parts
    multiplying = MachineLimits(gb_per_s=1e9, gflops=1e-9)
    whole, parts = (work.seconds_in_turn(chunks, 1, multiplying, count) for count in (1, 4))
    assert parts == pytest.approx(whole)


def test_the_roofline_is_the_longer_of_reading_and_multiplying():
    work = StepWork(num_bytes=8 * 10**9, flops=6 * 10**9)
    assert work.least_seconds(MachineLimits(gb_per_s=2, gflops=3)) == 4
    assert work.least_seconds(MachineLimits(gb_per_s=8, gflops=3)) == 2
    mixed = StepWork(num_bytes=1, flops=6 * 10**9, integer_ops=8 * 10**9)
    assert mixed.least_seconds(MachineLimits(8, gflops=3, integer_gops=4)) == 4
    limits = [MachineLimits(1, 5), MachineLimits(2, 4)]
    assert MachineLimits.median(limits) == MachineLimits(1.5, 4.5)
