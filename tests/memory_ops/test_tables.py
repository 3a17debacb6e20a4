"""The device tier keeps the table protocol."""

import pytest
import torch

from memory_ops import gather_rows
from memory_ops.tables.device import DeviceTable, empty_table


def test_a_lookup_is_the_gather_and_is_counted():
    table = DeviceTable(torch.randn(16, 5))
    rows, weights = torch.randint(0, 16, (3, 2, 4)), torch.rand(3, 2, 4)
    table.hint(rows)
    lookup = table.start(rows, weights)
    torch.testing.assert_close(lookup.finish(), gather_rows(table.table_RV, rows, weights))
    assert (table.num_rows, table.value_dim) == (16, 5)
    counted = table.statistics()
    assert (counted.lookups, counted.rows_requested) == (1, 24)


def test_a_table_is_a_matrix_of_floats():
    with pytest.raises(ValueError, match="table"):
        DeviceTable(torch.zeros(4, dtype=torch.float32))
    with pytest.raises(ValueError, match="table"):
        DeviceTable(torch.zeros(4, 4, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_table_is_memory_of_its_own(dtype):
    table = empty_table(33, 7, dtype)
    assert table.shape == (33, 7) and table.dtype == dtype
    table.fill_(2)
    assert table.sum().item() == 33 * 7 * 2
