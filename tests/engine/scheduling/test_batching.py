"""Step plans as tensors: the block table is updated in place between steps."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.params import SamplingParams
from engine.scheduling.batching import BlockTable
from engine.scheduling.step_plan import SequenceChunk

GREEDY = SamplingParams(temperature=0)


def chunk(*block_ids: int) -> SequenceChunk:
    return SequenceChunk("x", (1,), 0, block_ids, GREEDY, 0, True)


def rows_of(table_SB, chunks) -> list[tuple[int, ...]]:
    return [
        tuple(row[: len(one.block_ids)].tolist()) for row, one in zip(table_SB, chunks, strict=True)
    ]


IDS = st.lists(st.integers(0, 5), min_size=1, max_size=9).map(tuple)


@given(plans=st.lists(st.lists(IDS, min_size=1, max_size=5), max_size=8))
def test_rows_hold_the_chunks_ids_after_any_history(plans):
    table = BlockTable()
    for plan in plans:
        chunks = [chunk(*ids) for ids in plan]
        table_SB = table.update(chunks)
        assert table_SB.dtype == torch.int64
        assert table_SB.shape == (len(plan), max(map(len, plan)))
        assert rows_of(table_SB, chunks) == plan


class CountedWrites:
    """An array that counts writes of ids."""

    def __init__(self, ids_SB):
        self.ids_SB, self.count = ids_SB, 0
        self.shape = ids_SB.shape

    def __getitem__(self, at):
        return self.ids_SB[at]

    def __setitem__(self, at, ids):
        self.count += np.size(ids)
        self.ids_SB[at] = ids


def test_only_new_ids_are_written():
    table = BlockTable()
    long, short = tuple(range(1000)), (7, 8)
    table.update([chunk(*long), chunk(*short), chunk(*long)])
    # one more id fits without growing
    table._ids_SB = writes = CountedWrites(table._ids_SB)
    same = [chunk(*long), chunk(*short), chunk(*long)]
    table.update(same)
    assert writes.count == 0
    grown = [chunk(*long, 1), chunk(*short, 2, 3), chunk(*long)]
    assert rows_of(table.update(grown), grown) == [one.block_ids for one in grown]
    assert writes.count == 3
    # another sequence takes the row
    other = [chunk(*short), chunk(*short, 2, 3)]
    assert rows_of(table.update(other), other) == [one.block_ids for one in other]
    assert writes.count == 3 + 2


def test_the_table_is_a_view_that_does_not_copy():
    table = BlockTable()
    table.update([chunk(1, 2, 3), chunk(4)])
    first = table.update([chunk(1, 2, 3), chunk(4)])
    assert first.data_ptr() == table.update([chunk(1, 2)]).data_ptr()
