"""The number of micro-batches: by tokens, by rows to fetch, and by what an earlier step fetched."""

from types import SimpleNamespace

import pytest

from engine.executors.micro_batch_count import MicroBatchCount, SplitRule
from memory_ops.tables.table_statistics import TableStatistics

ROWS = 4  # that a token reads of one table


class CountedTable:
    """A table whose counters a test sets."""

    num_rows = 1000

    def __init__(self, capacity: int | None) -> None:
        self.fetched_capacity = capacity
        self.counts = TableStatistics()

    def statistics(self) -> dict[int, TableStatistics]:
        return {3: self.counts}


def count_of(rule: SplitRule, *capacities: int | None) -> tuple[MicroBatchCount, CountedTable]:
    """The count of a model with one layer that reads tables of these capacities."""
    tables = tuple(CountedTable(capacity) for capacity in capacities)
    memory = SimpleNamespace(tables=tables, num_references=ROWS)
    return MicroBatchCount([memory], rule), tables[0]


def test_a_step_is_split_if_it_will_probably_fetch_enough_rows():
    count, table = count_of(SplitRule(((100, 4), (8, 2)), least_rows=100), 500)
    # before any step, all rows are expected to be fetched
    assert [count.of(tokens) for tokens in (7, 24, 25, 99, 100)] == [1, 1, 2, 2, 4]
    with count.watched(30):
        table.counts = TableStatistics(requested_rows=120, misses=40, late=20)
    assert [count.of(tokens) for tokens in (49, 50)] == [1, 2]
    with count.watched(7):  # a small step says little
        table.counts = TableStatistics(requested_rows=148, misses=40, late=20)
    assert count.of(50) == 2
    with count.watched(30):
        table.counts = TableStatistics(requested_rows=268, misses=41, late=20)
    assert count.of(100) == 1
    # graphs are captured for steps that fetch all rows
    assert (count.most(100), count.limit(10_000)) == (4, 4)


@pytest.mark.parametrize(
    ("capacities", "most", "limit"),
    [((400,), 2, 2), ((399,), 1, 2), ((400, 399), 1, 2), ((400, None), 1, 1)],
)
def test_all_tables_must_hold_the_rows_of_the_step(capacities, most, limit):
    count, _ = count_of(SplitRule(((8, 2),)), *capacities)
    assert (count.most(100), count.of(100), count.limit(100)) == (most, most, limit)


def test_a_model_without_memory_layers_is_never_split():
    count = MicroBatchCount([], SplitRule(((8, 2),)))
    with count.watched(100):
        pass
    assert (count.of(100), count.most(100), count.limit(100)) == (1, 1, 1)
