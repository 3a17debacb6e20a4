"""The shares of tensor-parallel ranks: together they have every weight once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.executors.parallel.shares import RankShare
from engine.model.transformer import Transformer
from tests.models import feed_forward_changes, tiny_config

KINDS = ("dense", "memory_plus", "moe")


@given(
    kv_heads=st.integers(1, 5),
    per_kv_head=st.integers(1, 3),
    inner=st.integers(5, 40),
    size=st.integers(1, 5),
    width=st.integers(1, 4),
)
def test_the_parts_of_all_ranks_are_the_whole_weight(kv_heads, per_kv_head, inner, size, width):
    size = min(size, kv_heads)
    config = tiny_config(
        num_heads=kv_heads * per_kv_head,
        num_kv_heads=kv_heads,
        intermediate_size=inner,
        attention_bias=True,
        **feed_forward_changes(*KINDS, value_dim=width * size),
    )
    shares = [RankShare(config, rank, size) for rank in range(size)]
    with torch.device("meta"):
        weights = Transformer(config).state_dict()
    num_split = 0
    for name, weight in weights.items():
        parts = [share.part(name) for share in shares]
        if None in parts:
            assert set(parts) == {None}
            continue
        num_split += 1
        ends = [0, *(part.last for part in parts)]
        assert [part.first for part in parts] == ends[:-1]
        assert ends[-1] == weight.shape[parts[0].dim] and all(map(len, parts))
    # attention's four weights and three biases, SwiGLU, gate and projection of the memory, experts
    assert num_split == 3 * 7 + 3 + 3 + 5 * 3
    heads = [share.kv_config.num_kv_heads for share in shares]
    assert sum(heads) == kv_heads and max(heads) - min(heads) <= 1
    for ranges, count in (
        ([share.vocabulary for share in shares], config.vocab_size),
        ([share.table_rows for share in shares], config.memory.num_rows),
        ([share.value_columns for share in shares], config.memory.value_dim),
    ):
        assert [at for one in ranges for at in one] == list(range(count))


@pytest.mark.parametrize(
    ("size", "changes", "reason"),
    [
        (3, {}, "3 exceeds num_key_value_heads 2"),
        (2, {"intermediate_size": 1}, "2 exceeds intermediate_size 1"),
        (2, feed_forward_changes("pkm", value_dim=33, value_projection=True), "does not divide"),
    ],
)
def test_a_model_with_too_few_heads_or_columns_is_refused(size, changes, reason):
    with pytest.raises(ConfigError, match=f"tensor_parallel: .*{reason}"):
        RankShare(tiny_config(**changes), 0, size)
