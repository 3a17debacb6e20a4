"""Time that a CPU adds to a step, against sums by hand."""

import pytest

from engine.model.step_work import Chunk
from server.plan.cpu_time import CpuCosts, cpu_seconds
from tests.models import feed_forward_changes, tiny_config

NOTHING = dict.fromkeys(CpuCosts.__dataclass_fields__, 0.0)


def seconds(config, chunks, threads=1, **costs):
    return cpu_seconds(config, 64, chunks, threads, CpuCosts(**(NOTHING | costs)))


def test_threads_share_all_but_the_step_its_sequences_and_prompts():
    config, chunks = tiny_config(), [Chunk(9, 1)] * 5
    for name, count in (("step", 1), ("sequence", 5)):
        assert [seconds(config, chunks, n, **{name: 1.0}) for n in (1, 2)] == [count, count]
    one, two = (seconds(config, chunks, n, element=1.0) for n in (1, 2))
    # two layers, 32 wide: two norms, projections of (4 + 2 * 2) heads of 8, a gate of 48
    assert one == 2 * two == 5 * 2 * (2 * 32 + 64 + 48)


def test_a_prompt_costs_once_and_its_later_parts_nothing():
    config = tiny_config()
    chunks = [Chunk(0, 8), Chunk(0, 2), Chunk(8, 8), Chunk(16, 1), Chunk(0, 1)]
    assert [seconds(config, chunks, n, prompt=1.0) for n in (1, 2)] == [2, 2]


def test_attention_of_one_token_reads_all_keys_and_that_of_a_prompt_pairs():
    config = tiny_config()
    decode, prompt = [Chunk(9, 1)] * 3, [Chunk(4, 6)]
    assert seconds(config, decode, kv_position=1.0) == 3 * 10 * 2 * 2
    assert seconds(config, decode, pair=1.0) == 0
    assert seconds(config, prompt, kv_position=1.0) == 0
    pairs = 5 + 6 + 7 + 8 + 9 + 10
    assert seconds(config, prompt, pair=1.0) == pytest.approx(pairs * 2 * 4)


def test_memories_score_subkeys_and_read_rows():
    config = tiny_config(**feed_forward_changes("memory_plus", "peer"))
    chunks = [Chunk(0, 7)]
    # two layers of 2 heads with 8 subkeys a half; the peer layer reads two tables
    assert seconds(config, chunks, subkey=1.0) == 7 * 2 * 2 * 16
    assert seconds(config, chunks, row=1.0) == 7 * 3 * 2 * 3
    assert seconds(config, chunks, row_value=1.0) == 7 * 3 * 2 * 3 * 32


def test_rows_that_no_cache_has_cost_more():
    # two tables of 4096 rows of 2^14 bytes: 128 MiB, of which 24 MiB stay in caches
    config = tiny_config(**feed_forward_changes("pkm", "pkm", num_subkeys=64, share_values=False))
    costs = CpuCosts(**(NOTHING | {"far_row": 1.0}))
    rows = 5 * 2 * 2 * 3
    assert cpu_seconds(config, 2**14, [Chunk(0, 5)], 1, costs) == rows * (1 - 24 / 128)
    assert cpu_seconds(config, 2**10, [Chunk(0, 5)], 1, costs) == 0


def test_a_mixture_counts_the_experts_of_a_token():
    config = tiny_config(**feed_forward_changes("moe", "moe"))
    assert seconds(config, [Chunk(0, 1)], element=1.0) == 2 * (2 * 32 + 64 + 2 * 24)
