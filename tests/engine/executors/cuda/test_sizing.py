"""KV blocks follow from the memory that weights, tables, steps and graphs leave."""

import logging

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cuda.sizing import num_kv_blocks
from tests.models import feed_forward_changes, tiny_config

GIB = 2**30
# two layers, two KV heads of 8 values: 128 bytes a token in bf16, 2 KiB a block
BLOCK = 2048


class Memory:
    """A GPU of 10 GiB; a step allocates 1 GiB."""

    def __init__(self, in_use: float = 4.0, peak: float = 1.0) -> None:
        self._in_use, self._peak = in_use, peak
        self.runs = 0

    def total(self) -> int:
        return 10 * GIB

    def in_use(self) -> int:
        assert self.runs, "what a step leaves behind counts"
        return int(self._in_use * GIB)

    def peak(self, work) -> int:
        work()
        self.runs += 1
        return int(self._peak * GIB)


def blocks(
    memory=None, max_positions=2**30, kinds=("dense", "dense"), *, has_tiers=True, **config
) -> int:
    model = tiny_config(max_positions=max_positions, **feed_forward_changes(*kinds))
    ran = []
    found = num_kv_blocks(
        model,
        EngineConfig(**config),
        2,
        memory or Memory(),
        lambda: ran.append(1),
        has_tiers=has_tiers,
    )
    assert ran == [1]
    return found


def test_all_that_is_left_becomes_kv_blocks(caplog):
    caplog.set_level(logging.INFO)
    # 9 of 10 GiB may be used; 4 are in use, twice 1 is for steps, a quarter is a reserve
    assert blocks() == int(2.75 * GIB) // BLOCK - 1
    assert "KV pool takes 2.75 GiB: the GPU has 10.00 GiB, of which 9.00 may be used" in caplog.text


def test_a_larger_share_and_a_smaller_step_leave_more():
    assert blocks(gpu_memory_utilization=1.0) == int(3.75 * GIB) // BLOCK - 1
    assert blocks(Memory(peak=0.5)) == int(3.75 * GIB) // BLOCK - 1


@pytest.mark.parametrize("kind", ["memory_plus", "pkm"])
def test_memory_of_row_patches_is_reserved_if_the_model_takes_them(kind):
    kinds = (kind, "dense")
    assert blocks(kinds=kinds, patch_memory_gib=0.5) == int(2.25 * GIB) // BLOCK - 1
    assert blocks(kinds=kinds, max_patches=0) == blocks(kinds=("peer", "dense")) == blocks()


def test_no_more_than_all_sequences_need():
    assert blocks(max_positions=160, max_num_seqs=3) == 3 * 10
    assert blocks(max_model_len=32, max_num_seqs=3) == 3 * 2


def test_what_the_user_asks_for_is_taken_or_refused():
    assert blocks(kv_cache_gib=1.0) == GIB // BLOCK
    with pytest.raises(ConfigError, match="^kv_cache_gib: .* leave 2.75 GiB"):
        blocks(kv_cache_gib=3.0)


def test_too_little_is_refused_with_what_to_change():
    lower = "lower --table-cache or --max-batched-tokens, use --table-tier host or"
    with pytest.raises(ConfigError, match=f"leave 0.00 GiB of the GPU; {lower}"):
        blocks(Memory(in_use=8.0))
    lower = "lower --kv-cache-gib or --max-batched-tokens, use more ranks or"
    with pytest.raises(ConfigError, match=f"leave 0.00 GiB of the GPU; {lower}"):
        blocks(Memory(in_use=8.0), kv_cache_gib=1.0, has_tiers=False)
