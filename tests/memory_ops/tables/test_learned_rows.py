"""Learned rows: sums and gradients equal those of a table with the deltas written in."""

import pytest
import torch

from memory_ops.row_formats import quantize_rows
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.learned_rows import LearnedRows
from memory_ops.tables.trained import TrainedTable
from tests.conftest import TOLERANCE

ROWS, WIDTH = 40, 24
CHOSEN = torch.tensor([0, 3, 17, 39])


def drawn():
    rows_THK = torch.randint(0, ROWS, (9, 2, 5))
    rows_THK[0, 0] = torch.tensor([0, 1, 3, 3, 39])
    return rows_THK, torch.rand(9, 2, 5)


def assert_close(found, wanted):
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=10 * atol)


@pytest.mark.parametrize("row_format", [None, "int8", "int4", "int4_row", "fp8"])
def test_lookups_equal_those_of_a_changed_table(row_format):
    table_RV = torch.randn(ROWS, WIDTH)
    rows = table_RV if row_format is None else quantize_rows(table_RV, row_format)
    base = DeviceTable(rows)
    learned = LearnedRows(base, CHOSEN)
    learned.deltas.table_RV[:-1] = torch.randn(len(CHOSEN), WIDTH)
    every = torch.arange(ROWS).view(ROWS, 1, 1)
    changed_RV = base.start(every, torch.ones(ROWS, 1, 1)).finish()
    changed_RV[CHOSEN] += learned.deltas.table_RV[:-1]
    rows_THK, weights_THK = drawn()
    wanted = DeviceTable(changed_RV).start(rows_THK, weights_THK).finish()
    assert_close(learned.start(rows_THK, weights_THK).finish(), wanted)


def test_gradients_equal_those_of_a_trained_table():
    table_RV = torch.randn(ROWS, WIDTH)
    learned, trained = LearnedRows(DeviceTable(table_RV), CHOSEN), TrainedTable(table_RV.clone())
    rows_THK, weights_THK = drawn()
    gradients = []
    for table in (learned, trained):
        weights = weights_THK.clone().requires_grad_()
        table.start(rows_THK, weights).finish().square().sum().backward()
        gradients.append(weights.grad)
    assert_close(*gradients)
    change, wanted = learned.deltas.take_reads(), trained.take_reads()
    sums = torch.zeros(len(CHOSEN) + 1, WIDTH)
    every = torch.zeros(ROWS, WIDTH)
    for one, out in ((change, sums), (wanted, every)):
        parts = one.weights_THK[..., None] * one.grad_TV[:, None, None, :]
        out.index_add_(0, one.rows_THK.flatten(), parts.view(-1, WIDTH))
    assert_close(sums[:-1], every[CHOSEN])
    assert not sums[-1].any()


@pytest.mark.parametrize("rows", [[], [3, 3], [4, 2], [-1, 2], [5, ROWS]])
def test_rows_must_ascend_within_the_table(rows):
    with pytest.raises(ValueError, match="ascending ids below 40"):
        LearnedRows(DeviceTable(torch.zeros(ROWS, 4)), torch.tensor(rows, dtype=torch.int64))


def test_rows_of_peer_cannot_be_learned():
    learned = LearnedRows(DeviceTable(torch.zeros(ROWS, 4)), CHOSEN)
    with pytest.raises(ValueError, match="PEER"):
        learned.start_dots(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 4))
