"""The host tier on a real GPU."""

import pytest
import torch

from engine.executors.lookahead import Lookahead, LookaheadConfig, predicted_memories
from engine.model.layout import TokenLayout
from memory_ops.row_formats import RowRecords
from memory_ops.tables.device import DeviceTable
from tests.memory_ops.table_kinds import KINDS, rows_of, table_of
from tests.models import feed_forward_changes, random_model, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture
def small_table():
    """Makes host tables with small caches; closes them after the test."""
    pytest.importorskip("triton")
    from memory_ops.page_lock import PageLock
    from memory_ops.tables.host import HostTable
    from memory_ops.tables.row_cache import RowCache, rows_memory
    from memory_ops.tables.streams import cuda_streams

    made = []

    def make(table, num_layers=1):
        cache = RowCache(table, 2**18, GPU, num_layers=num_layers, num_overflow=64)
        lock = PageLock(rows_memory(table), GPU)
        made.append(HostTable(table, cache, cuda_streams(GPU), lock))
        return made[-1]

    yield make
    for table in made:
        table.close()


def to_gpu(table):
    """The table, plain or records, on the GPU."""
    if isinstance(table, RowRecords):
        return RowRecords(table.records_RB.cuda(), table.row_format, table.value_dim)
    return table.cuda()


@pytest.mark.parametrize("kind", KINDS)
def test_lookups_equal_those_of_the_device_tier_bit_for_bit(small_table, kind):
    from memory_ops.triton_kernels import gather_rows, row_dots

    table = table_of(kind, torch.randn(5000, 576))
    host, device = small_table(table), to_gpu(table)
    for _ in range(20):
        rows = [rows_of(table, 9, 4, 8).square().div(5000).long().cuda() for _ in range(2)]
        weights, x = torch.rand(9, 4, 8, device=GPU), torch.randn(9, 576, device=GPU)
        host.hint(rows[1])
        sums, dots = host.start(rows[0], weights), host.start_dots(rows[1], x)
        host.start(rows[1], weights)
        assert torch.equal(dots.finish(), row_dots(device, rows[1], x))
        assert torch.equal(sums.finish(), gather_rows(device, rows[0], weights))
    torch.cuda.synchronize()  # statistics of an idle device are exact
    counted = host.statistics()[0]
    assert counted.hits and counted.misses and counted.prefetched_used
    assert counted.unique_rows == counted.hits + counted.misses


def test_lookups_are_captured_in_a_graph(small_table):
    from memory_ops.triton_kernels import gather_rows

    table = torch.randn(5000, 64)
    host, device = small_table(table), table.cuda()
    rows, weights = rows_of(table, 4, 2, 8).cuda(), torch.rand(4, 2, 8, device=GPU)
    host.hint(rows)
    host.start(rows, weights).finish()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        host.hint(rows)
        out = host.start(rows, weights).finish()
    for _ in range(20):
        rows.copy_(rows_of(table, 4, 2, 8))
        graph.replay()
        assert torch.equal(out, gather_rows(device, rows, weights))
    torch.cuda.synchronize()
    assert host.statistics()[0].lookups == 21


@pytest.mark.parametrize("kinds", [("memory_plus", "dense", "pkm"), ("dense", "peer")])
def test_a_model_gives_the_logits_of_device_tables(small_table, kinds):
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    rows = {name: table.rows for name, table in model.tables.items()}
    model.to(GPU).attach_tables({name: DeviceTable(one.to(GPU)) for name, one in rows.items()})
    tokens = torch.arange(7, device=GPU)
    layout = TokenLayout(tokens, (0, 7))
    with torch.no_grad():
        wanted = model(tokens, layout, tokens).logits_LV
        tables = {name: small_table(one, len(kinds)) for name, one in rows.items()}
        model.attach_tables(tables)
        lookahead = Lookahead(predicted_memories(model.layers), LookaheadConfig(1, 9))
        found = model(tokens, layout, tokens, before_layer=lookahead.before).logits_LV
    torch.testing.assert_close(found, wanted)
    torch.cuda.synchronize()
    counted = [counts for table in tables.values() for counts in table.statistics().values()]
    assert all(counts.lookups == 1 for counts in counted)
    assert any(counts.prefetched for counts in counted)
