"""The smallest and largest row cache of a model's tables."""

import torch

from engine.model.config import MemoryConfig
from memory_ops.tables.host_cache_size import host_cache_bytes
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.host_cache_limits import HostCacheLimits, host_cache_limits
from weights.checkpoints.model_bytes import model_bytes
from weights.checkpoints.table_files import RowLayout

MEMORY = MemoryConfig(num_heads=4, num_subkeys=64, top_k=32, query_dim=8, value_dim=256)


def layout(dtype: torch.dtype) -> RowLayout:
    return RowLayout(str(dtype), (MEMORY.num_rows, MEMORY.value_dim), dtype)


def test_tables_share_a_cache_that_suits_the_widest_rows():
    narrow, wide = layout(torch.bfloat16), layout(torch.float32)
    # 16,384 overflow rows and the 128 rows of a token, each with 16 bytes of bookkeeping
    smallest = 2**14 * 1024 + 128 * (1024 + 16)
    largest = 2**14 * 1024 + 4096 * (1024 + 16)
    assert host_cache_limits([wide], MEMORY) == (smallest, largest)
    assert host_cache_limits([narrow, wide, narrow], MEMORY) == (3 * smallest, 3 * largest)


def test_a_model_needs_the_cache_of_its_served_rows(tmp_path):
    changes = feed_forward_changes("memory_plus", "peer")
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "model")
    # a token reads 6 rows of 32 values
    for dtype, row_bytes in (("auto", 128), ("bfloat16", 64), ("int8", 64)):
        found = model_bytes(folder, "auto", dtype).host_cache
        assert found == (2 * host_cache_bytes(6, row_bytes), 2 * host_cache_bytes(64, row_bytes))
    dense = save_model(random_model(tiny_config()), tmp_path / "dense")
    assert model_bytes(dense, "auto", "auto").host_cache == HostCacheLimits(0, 0)
