"""Initial values of a table are the same for every division of it."""

import pytest
import torch

from memory_ops.tables.table_shard import TableShard
from weights.training import initialise
from weights.training.initialise import initialise_part, initialise_table


@pytest.mark.parametrize("shape", [(100, 7), (33, 5), (3, 5), (64, 16), (47, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_have_the_values_of_the_whole_table(monkeypatch, shape, axis):
    monkeypatch.setattr(initialise, "_DRAWN_NUMBERS", 200)
    whole = torch.empty(shape)
    generator = torch.Generator().manual_seed(5)
    initialise_table(whole, generator)
    parts, follow = [], set()
    for rank in range(3):
        shard = TableShard.even(shape, axis, rank, 3)
        parts.append(torch.empty(shard.local_shape))
        drawn = torch.Generator().manual_seed(5)
        initialise_part(parts[-1], shard, drawn)
        follow.add(float(torch.rand((), generator=drawn)))
    assert torch.equal(torch.cat(parts, dim=axis), whole)
    assert follow == {float(torch.rand((), generator=generator))}
