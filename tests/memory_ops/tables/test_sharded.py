"""Tables divided among threads: the same sums, gradients and steps as one whole table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_ops import operations
from memory_ops.sparse_adam import AdamStep
from memory_ops.tables.column_sharded import ColumnShardedTable
from memory_ops.tables.row_sharded import RowShardedTable
from memory_ops.tables.table_shard import TableShard
from memory_ops.tables.trained import TrainedTable
from tests.thread_replicas import in_group

STEP = AdamStep.at(1, 0.1, (0.9, 0.95), 1e-8, scale=0.7)
ROW_STEP = AdamStep.at(1, 0.1, (0.9, 0.95), 1e-8, scale=0.7, is_row_wise=True)
KINDS = {"rows": RowShardedTable, "columns": ColumnShardedTable}


def train(table, tokens, with_dots, is_row_wise, replicas=None):
    """Outputs and gradients of two lookups of these tokens, and the table after a step."""
    rows_THK, weights_THK, x_TV, grad_TV = tokens
    weights, x = weights_THK.clone().requires_grad_(), x_TV.clone().requires_grad_()
    found = []
    for _ in range(2):
        if with_dots:
            out = table.start_dots(rows_THK, x).finish()
            out.backward(weights_THK)
        else:
            out = table.start(rows_THK, weights).finish()
            out.backward(grad_TV)
        found.append(out.detach())
    reads = table.take_reads()
    groups = operations.group_rows(reads.rows_THK, reads.weights_THK)
    moments = table.new_moments(is_row_wise=is_row_wise, dtype=torch.float32)
    table.update(moments, groups, reads.grad_TV, ROW_STEP if is_row_wise else STEP)
    counts_R = torch.zeros(table.table_RV.shape[0], dtype=torch.int64)
    counts_R[groups.rows_U] = table.read_counts(groups)
    assert table.take_reads() is None
    return found, (x if with_dots else weights).grad, table.table_RV, counts_R


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=3),
    st.integers(3, 30),
    st.integers(3, 20),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_a_divided_table_equals_a_whole_one(kind, lengths, num_rows, width, dots, row_wise, seed):
    torch.manual_seed(seed)
    total = max(sum(lengths), 1)
    lengths[-1] += total - sum(lengths)
    count, axis = len(lengths), list(KINDS).index(kind)
    rows_RV = torch.randn(num_rows, width)
    shape_THK = total, 2, 3
    tokens = [torch.randint(num_rows, shape_THK), torch.randn(shape_THK)]
    tokens += [torch.randn(total, width) for _ in range(2)]
    parts = list(zip(*(one.split(lengths) for one in tokens), strict=True))
    wanted = train(TrainedTable(rows_RV.clone()), tokens, dots, row_wise)

    def member(replicas):
        shard = TableShard.even((num_rows, width), axis, replicas.rank, count)
        part_RV = shard.part_of(rows_RV).clone(memory_format=torch.contiguous_format)
        table = KINDS[kind](part_RV, shard, replicas)
        assert (table.num_rows, table.value_dim) == (num_rows, width)
        return train(table, parts[replicas.rank], dots, row_wise)

    found = in_group(count, member)
    for index in range(2):
        outputs = torch.cat([one[0][index] for one in found])
        torch.testing.assert_close(outputs, wanted[0][index])
    torch.testing.assert_close(torch.cat([one[1] for one in found]), wanted[1])
    table_RV = torch.cat([one[2] for one in found], dim=axis)
    # Adam's first step is nearly the sign of the gradient, which rounding may change around 0
    torch.testing.assert_close(table_RV, wanted[2], rtol=1e-3, atol=1e-3)
    counts = [one[3] for one in found]
    if kind == "rows":
        counts = [torch.cat(counts)]
    assert all(torch.equal(one, wanted[3]) for one in counts)


def test_a_part_of_another_shape_is_refused():
    shard = TableShard.even((8, 4), 0, 0, 2)
    with pytest.raises(ValueError, match=r"table: expected a part of shape \(4, 4\), got \(8, 4\)"):
        RowShardedTable(torch.zeros(8, 4), shard, None)
