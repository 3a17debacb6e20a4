"""Trained tables: gradients of the weights, and records of the reads."""

import copy

import pytest
import torch

from engine.model.config import MemoryConfig
from engine.model.memory_layer import MemoryLayer
from engine.model.norm import RmsNorm
from memory_ops import reference
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.trained import TrainedTable
from memory_ops.tables.value_table import ValueTable


def memory_layer(table):
    made = MemoryLayer(MemoryConfig(2, 6, 3, query_dim=8, value_dim=5), "memory_plus", 7, 1e-5)
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    made.attach(table)
    return made


def test_gradients_equal_those_of_a_parameter_table():
    rows = torch.randn(36, 5)
    parameter = torch.nn.Parameter(rows.clone())
    trained = TrainedTable(rows)
    dense, sparse = memory_layer(DeviceTable(parameter)), memory_layer(trained)
    x = torch.randn(4, 7)
    for made in (dense, sparse):
        made(x).square().sum().backward()
        made(2 * x).square().sum().backward()
    for one, other in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    rows_U, sums_UV = reference.row_gradients(*trained.take_reads())
    found = torch.zeros(36, 5).index_copy_(0, rows_U, sums_UV)
    torch.testing.assert_close(found, parameter.grad.to_dense())
    assert trained.take_reads() is None


def test_gradients_of_products_equal_those_of_parameter_tables():
    config = MemoryConfig(2, 6, 3, query_dim=8, value_dim=7)
    norm = RmsNorm(7, 1e-5)
    made = MemoryLayer(config, "peer", 7, 1e-5, norm)
    for parameter in (*made.parameters(), norm.weight):
        torch.nn.init.normal_(parameter)
    twin = copy.deepcopy(made)
    values, down = torch.randn(36, 7), torch.randn(36, 7)
    parameters = [torch.nn.Parameter(rows.clone()) for rows in (values, down)]
    trained = TrainedTable(values), TrainedTable(down)
    made.attach(*trained)
    twin.attach(*map(DeviceTable, parameters))
    x, other = (torch.randn(4, 7, requires_grad=True) for _ in range(2))
    other.data.copy_(x)
    made(x).square().sum().backward()
    twin(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for table, parameter in zip(trained, parameters, strict=True):
        rows_U, sums_UV = reference.row_gradients(*table.take_reads())
        found = torch.zeros(36, 7).index_copy_(0, rows_U, sums_UV)
        torch.testing.assert_close(found, parameter.grad.to_dense())


def test_reads_are_recorded_if_nothing_else_is_trained():
    trained = TrainedTable(torch.randn(36, 5))
    made = memory_layer(trained).requires_grad_(False)
    made(torch.randn(4, 7)).sum().backward()
    assert trained.take_reads().rows_THK.shape == (4, 2, 3)


def test_a_forward_without_gradients_records_no_reads():
    trained: ValueTable = TrainedTable(torch.randn(36, 5))
    with torch.no_grad():
        memory_layer(trained)(torch.randn(4, 7))
    assert trained.take_reads() is None and trained.statistics()[0].lookups == 1


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(3, 3).half(), torch.zeros(3, 4).t()])
def test_other_tensors_are_refused(wrong):
    with pytest.raises(ValueError, match="table: expected"):
        TrainedTable(wrong)


def test_kernels_cannot_read_a_trained_table_directly():
    table = TrainedTable(torch.randn(16, 5))
    assert table.row_source(0) is None and table.fetched_capacity is None
