"""The table optimizer: steps of several tables, scaling, and row-wise moments."""

import pytest
import torch

from memory_ops import reference
from memory_ops.tables.trained import TableReads, TrainedTable
from weights.training.table_optimizer import TableOptimizer


def reads(num_rows, width):
    rows = torch.randint(0, num_rows, (6, 2, 3))
    return TableReads(rows, torch.randn(6, 2, 3), torch.randn(6, width))


def test_steps_of_two_tables_equal_torchs_sparse_adam():
    tables = [TrainedTable(torch.randn(30, 8)), TrainedTable(torch.randn(12, 5))]
    theirs = [torch.nn.Parameter(table.table_RV.clone()) for table in tables]
    optimizer = TableOptimizer(tables, betas=(0.8, 0.95), eps=1e-6)
    their_optimizer = torch.optim.SparseAdam(theirs, lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for scale in (1.0, 0.3, 2.0):
        squares = 0.0
        for table, parameter in zip(tables, theirs, strict=True):
            # the gradients of two passes add up
            taken = [reads(*table.table_RV.shape) for _ in range(2)]
            table.reads += taken
            whole = TableReads(*(torch.cat(parts) for parts in zip(*taken, strict=True)))
            rows_U, sums_UV = reference.row_gradients(*whole)
            squares += float(sums_UV.double().square().sum())
            parameter.grad = torch.sparse_coo_tensor(
                rows_U[None], sums_UV * scale, parameter.shape, check_invariants=True
            )
        assert optimizer.collect() == pytest.approx(squares, rel=1e-5)
        optimizer.step(0.1, scale)
        their_optimizer.step()
    for table, parameter in zip(tables, theirs, strict=True):
        torch.testing.assert_close(table.table_RV, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_row_wise_keeps_one_moment_per_row():
    table = TrainedTable(torch.zeros(10, 4))
    optimizer = TableOptimizer([table], betas=(0.9, 0.99), is_row_wise=True)
    table.reads.append(reads(10, 4))
    optimizer.collect()
    optimizer.step(0.1)
    ((first, second),) = optimizer.moments
    assert first is None and second.shape == (10,)
    # the first step of a row is its gradient scaled to a root mean square of the learning rate
    moved = table.table_RV[second > 0]
    torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((len(moved),), 0.1))


def test_moments_in_bf16_change_a_row_by_less_than_a_hundredth_of_its_steps():
    begin = torch.randn(20, 8)
    tables = [TrainedTable(begin.clone()) for _ in range(2)]
    dtypes = torch.float32, torch.bfloat16
    for table, dtype in zip(tables, dtypes, strict=True):
        optimizer = TableOptimizer([table], betas=(0.9, 0.95), moment_dtype=dtype)
        assert {one.dtype for one in optimizer.moments[0]} == {dtype}
        torch.manual_seed(3)
        for _ in range(50):
            table.reads.append(reads(20, 8))
            optimizer.collect()
            optimizer.step(0.01)
    exact, narrow = (table.table_RV - begin for table in tables)
    assert (narrow - exact).norm() < 0.01 * exact.norm()


def test_a_table_without_reads_stays_unchanged():
    table = TrainedTable(torch.ones(4, 3))
    optimizer = TableOptimizer([table])
    assert optimizer.collect() == 0
    optimizer.step(0.1)
    assert torch.equal(table.table_RV, torch.ones(4, 3)) and optimizer.step_count == 1
