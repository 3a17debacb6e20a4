"""Division of a table into ranges of rows or columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops.tables.table_shard import TableShard


@given(st.integers(0, 1), st.integers(1, 9), st.integers(0, 40))
def test_shards_cover_a_table_once_and_evenly(axis, count, more):
    shape = (count + more, 3) if axis == 0 else (3, count + more)
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    shards = [TableShard.even(shape, axis, rank, count) for rank in range(count)]
    parts = [one.part_of(whole) for one in shards]
    assert torch.equal(torch.cat(parts, dim=axis), whole)
    assert [tuple(part.shape) for part in parts] == [one.local_shape for one in shards]
    assert shards[0].sizes == [one.size for one in shards]
    assert max(shards[0].sizes) - min(shards[0].sizes) <= 1
    assert [one.first for one in shards] == [int(sum(shards[0].sizes[:r])) for r in range(count)]


def test_a_process_without_a_part_is_refused():
    with pytest.raises(ValueError, match="3 rows cannot be divided by 4"):
        TableShard.even((3, 9), 0, 0, 4)
    with pytest.raises(ValueError, match="2 columns cannot be divided by 3"):
        TableShard.even((9, 2), 1, 0, 3)
