"""Counters of value tables: by table and layer, read once per second and when idle."""

from types import SimpleNamespace

import torch

from engine.config import EngineConfig
from engine.request import TableCounts
from engine.table_counts import TableCounter
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.table_statistics import TableStatistics
from tests.models import engine_of, feed_forward_changes, greedy, random_model, tiny_config


class CountedTable(DeviceTable):
    """A table that counts the reads of its statistics."""

    num_reads = 0

    def statistics(self):
        self.num_reads += 1
        return super().statistics()


def test_counts_are_reported_by_table_and_layer():
    totals = TableStatistics(1, 2, 3, 4, 5, 6, 7, 8, 9, 0.5)
    table = SimpleNamespace(tier="disk", statistics=lambda: {7: totals})
    (counts,) = TableCounter({"memory.table": table}).take(is_idle=True)
    assert counts == TableCounts(table="memory.table", tier="disk", layer=7, totals=totals)


def test_totals_can_be_added_and_subtracted():
    first, second = TableStatistics(1, 2, 3, stall_seconds=0.5), TableStatistics(hits=4, late=5)
    both = TableStatistics.sum([first, second])
    assert both == TableStatistics(1, 2, 3, 4, 5, stall_seconds=0.5)
    assert both.since(first) == second and TableStatistics.sum([]) == TableStatistics()


def test_faults_name_the_lost_tables():
    lost = SimpleNamespace(fault="table: was changed", statistics=dict)
    tables = {"whole": DeviceTable(torch.zeros(4, 2)), "lost": lost}
    assert TableCounter(tables).faults() == ("table: was changed",)


def test_tables_are_read_once_per_second_and_when_idle():
    table, now = CountedTable(torch.randn(4, 8)), [100.0]
    counter = TableCounter({"memory.table": table}, lambda: now[0])
    was_read = []
    for seconds in (0, 0.5, 0.4, 0.2, 0.9, 0.2):
        now[0] += seconds
        was_read.append(counter.take(is_idle=False) is not None)
    assert was_read == [True, False, False, True, False, True]
    assert counter.take(is_idle=False) is None and counter.take(is_idle=True) == ()
    assert table.num_reads == 4


def test_an_idle_engine_has_reported_every_lookup():
    model = random_model(tiny_config(**feed_forward_changes("memory_plus", "dense", "peer")))
    tables = {name: CountedTable(table.rows) for name, table in model.tables.items()}
    model.attach_tables(tables)
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.001))
    engine.add(greedy("a", [1, 2, 3], 5))
    reported, given = [], 0
    while engine.has_work:
        statistics = engine.step().statistics
        reported.append(statistics.tables)
        given += statistics.new_tokens
    assert given == 5
    found = {(one.table, one.layer): one for one in reported[-1]}
    # 3 prompt tokens and 4 generated ones, 2 heads x 3 rows
    assert {name: one.totals.requested_rows for name, one in found.items()} == {
        ("memory.table", 0): 42,
        ("memory.table", 2): 42,
        ("memory.down_table", 2): 42,
    }
    assert {one.tier for one in reported[-1]} == {"device"}


def test_a_model_without_tables_has_no_counts():
    engine = engine_of(random_model(tiny_config()), EngineConfig(kv_cache_gib=0.001))
    engine.add(greedy("a", [1], 2))
    assert engine.step().statistics.tables in (None, ()) and engine.step().statistics.tables == ()
