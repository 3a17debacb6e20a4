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
        # padding to 40 tokens requests rows too
        table.counts = TableStatistics(requested_rows=160, misses=40, late=20)
    assert [count.of(tokens) for tokens in (49, 50)] == [1, 2]
    with count.watched(7):  # a small step says little
        table.counts = TableStatistics(requested_rows=188, misses=40, late=20)
    assert count.of(50) == 2
    with count.watched(30):
        table.counts = TableStatistics(requested_rows=308, misses=41, late=20)
    assert count.of(100) == 1
    # graphs are captured for steps that fetch all rows
    assert (count.most(100), count.limit(10_000)) == (4, 4)


@pytest.mark.parametrize(
    ("capacities", "most", "limit"),
    [((400,), 2, 2), ((399,), 1, 2), ((400, 399), 1, 2), ((400, None), 1, 1)],
)
def test_all_tables_must_hold_the_rows_of_lookups_in_flight_together(capacities, most, limit):
    count, _ = count_of(SplitRule(((8, 2),), needs_slots=True), *capacities)
    assert (count.most(100), count.of(100), count.limit(100)) == (most, most, limit)
    # one lookup in flight reads its rows in parts
    count, _ = count_of(SplitRule(((8, 2),)), *capacities)
    assert (count.most(100), count.of(100), count.limit(100)) == (limit, limit, limit)


def test_each_further_micro_batch_reads_the_weights_once_more():
    count, _ = count_of(SplitRule(((100, 4), (8, 2)), least_rows=200), 500)
    # 4 rows a token: two micro-batches need 200 of them, four need 600
    assert [count.of(tokens) for tokens in (49, 50, 100, 149, 150)] == [1, 2, 1, 1, 4]


def test_rows_behind_the_first_part_of_a_lookup_are_no_reason_to_split():
    rule = SplitRule(((8, 2),), least_rows=100, most_references=12 * ROWS)
    # each of two micro-batches fetches the rows of 12 tokens while the other one runs
    assert count_of(rule, 500)[0].of(1000) == 1
    rule = SplitRule(((8, 2),), least_rows=100, most_references=13 * ROWS)
    count, _ = count_of(rule, 500)
    assert [count.of(tokens) for tokens in (24, 25, 1000)] == [1, 2, 2]


def test_a_model_without_memory_layers_is_never_split():
    count = MicroBatchCount([], SplitRule(((8, 2),)))
    with count.watched(100):
        pass
    assert (count.of(100), count.most(100), count.limit(100)) == (1, 1, 1)
