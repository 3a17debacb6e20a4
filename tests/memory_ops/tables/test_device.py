"""The device tier: lookups, counters and direct reads by kernels."""

import pytest
import torch

from memory_ops.operations import gather_rows
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.table_statistics import TableStatistics


def test_a_lookup_equals_gather_rows_and_is_counted():
    table = DeviceTable(torch.randn(16, 5))
    rows, weights = torch.randint(0, 16, (3, 2, 4)), torch.rand(3, 2, 4)
    table.hint(rows)
    lookup = table.start(rows, weights)
    torch.testing.assert_close(lookup.finish(), gather_rows(table.rows, rows, weights))
    assert (table.num_rows, table.value_dim) == (16, 5)
    counted = table.statistics()[0]
    assert (counted.lookups, counted.requested_rows) == (1, 24)


def test_kernels_read_rows_in_place_and_count_lookups():
    table = DeviceTable(torch.randn(16, 5))
    source = table.row_source(3)
    assert table.fetched_capacity is None
    assert source.rows is table.rows and source.fetcher_address is None
    source.check()
    source.count(torch.zeros(3, 2, 4, dtype=torch.int64))
    assert table.statistics() == {3: TableStatistics(24, lookups=1)}


def test_a_table_is_a_matrix_of_floats():
    with pytest.raises(ValueError, match="table"):
        DeviceTable(torch.zeros(4, dtype=torch.float32))
    with pytest.raises(ValueError, match="table"):
        DeviceTable(torch.zeros(4, 4, dtype=torch.int8))
