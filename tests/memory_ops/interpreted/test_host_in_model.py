"""A model with tables in host memory gives the outputs of one with tables on the device."""

import pytest
import torch

from engine.executors.lookahead import Lookahead, LookaheadConfig, predicted_memories
from engine.model.layout import TokenLayout
from memory_ops.tables.host import HostTable
from memory_ops.tables.row_cache import RowCache
from memory_ops.tables.streams import StreamPair
from tests.memory_ops.fake_streams import FakeDevice, HostCaller
from tests.models import feed_forward_changes, random_model, tiny_config

pytestmark = pytest.mark.slow

TOKENS = 7


def on_host(rows, num_layers: int) -> HostTable:
    """A host table that caches 8 rows; its work runs when the model waits for a result."""
    device = FakeDevice()
    caller = HostCaller(device, lambda ready: ready[0])
    row_bytes = rows.shape[1] * 4
    cache_bytes = 64 * row_bytes + 8 * (row_bytes + 16)
    cache = RowCache(
        rows, cache_bytes, rows.device, num_layers=num_layers, num_ways=2, num_overflow=64
    )
    return HostTable(rows, cache, StreamPair(lambda: caller, device.side))


@pytest.mark.parametrize("kinds", [("memory_plus", "dense", "pkm"), ("dense", "peer")])
def test_a_model_reads_tables_in_host_memory(kinds):
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    layout, tokens = TokenLayout(torch.arange(TOKENS), (0, TOKENS)), torch.arange(TOKENS)
    positions = torch.arange(TOKENS)
    with torch.no_grad():
        wanted = model(tokens, layout, positions).logits_LV
        tables = {name: on_host(table.rows, len(kinds)) for name, table in model.tables.items()}
        model.attach_tables(tables)
        lookahead = Lookahead(predicted_memories(model.layers), LookaheadConfig(1, 9))
        found = model(tokens, layout, positions, before_layer=lookahead.before).logits_LV
    torch.testing.assert_close(found, wanted)
    counted = [counts for table in tables.values() for counts in table.statistics().values()]
    assert all(counts.lookups == 1 and counts.misses for counts in counted)
    assert any(counts.prefetched for counts in counted)
