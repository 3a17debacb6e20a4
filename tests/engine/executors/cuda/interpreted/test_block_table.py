"""Updates of the block table: the kernel against its twin in plain torch."""

import pytest
import torch

from engine.executors.cuda.kernels.block_table import (
    update_block_table,
    update_block_table_reference,
)


@pytest.mark.parametrize("num_columns", [40, 33])
@pytest.mark.parametrize("count", [0, 1, 128, 129, 200])
def test_the_first_updates_are_written_and_no_other(count, num_columns):
    # a view with a row stride of 40
    block_table_PB = torch.full((16, 40), -1, dtype=torch.int32)[:, :num_columns]
    places = torch.randperm(16 * num_columns)[:200]
    seats, columns = places // num_columns, places % num_columns
    updates_N3 = torch.stack((seats, columns, torch.randint(0, 2**31, (200,))), dim=1)
    # past the count, nothing is read
    updates_N3[count:] = -(2**60)
    wanted_PB, count_1 = block_table_PB.clone(), torch.tensor([count])
    update_block_table_reference(wanted_PB, updates_N3, count_1)
    assert (wanted_PB >= 0).sum() == count
    update_block_table(block_table_PB, updates_N3, count_1)
    assert torch.equal(block_table_PB, wanted_PB)


def test_space_for_no_update():
    block_table_PB = torch.zeros(2, 3, dtype=torch.int32)
    update_block_table(block_table_PB, torch.zeros(0, 3, dtype=torch.int64), torch.tensor([0]))
    assert not block_table_PB.any()


def test_seats_of_one_row():
    block_table_PB = torch.zeros(1, 3, dtype=torch.int32)
    update_block_table(block_table_PB, torch.tensor([[0, 2, 7]]), torch.tensor([1]))
    assert block_table_PB.tolist() == [[0, 0, 7]]
