"""The device tier keeps the table protocol."""

import re
from pathlib import Path

import pytest
import torch

from memory_ops.anonymous import anonymous_zeros
from memory_ops.operations import gather_rows
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.table_statistics import TableStatistics


def test_a_lookup_is_the_gather_and_is_counted():
    table = DeviceTable(torch.randn(16, 5))
    rows, weights = torch.randint(0, 16, (3, 2, 4)), torch.rand(3, 2, 4)
    table.hint(rows)
    lookup = table.start(rows, weights)
    torch.testing.assert_close(lookup.finish(), gather_rows(table.rows, rows, weights))
    assert (table.num_rows, table.value_dim) == (16, 5)
    counted = table.statistics()[0]
    assert (counted.lookups, counted.requested_rows) == (1, 24)


def test_kernels_read_the_rows_of_a_device_table_in_place_and_count_lookups():
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anonymous_memory_is_zero_and_writable(dtype):
    table = anonymous_zeros((33, 7), dtype)
    assert table.shape == (33, 7) and table.dtype == dtype and not table.any()
    table.fill_(2)
    assert table.sum().item() == 33 * 7 * 2


def in_memory(tensor: torch.Tensor) -> dict[str, int]:
    """The kernel's account (kB) of the mapping that holds a tensor."""
    sections = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    )
    for section in filter(None, sections):
        start, end = (int(part, 16) for part in section.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return {name: int(kb) for name, kb in re.findall(r"^(\w+): +(\d+) kB", section, re.M)}
    raise AssertionError("no mapping holds the tensor")


def test_anonymous_memory_is_taken_when_written_and_in_huge_pages():
    tensor = anonymous_zeros((64, 2**20), torch.uint8)
    assert in_memory(tensor)["Rss"] < 4096
    tensor.fill_(1)
    taken = in_memory(tensor)
    assert taken["Rss"] >= 64 * 1024
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert taken["AnonHugePages"] > 0
