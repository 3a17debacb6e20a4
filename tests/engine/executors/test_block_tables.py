"""Block tables: rows hold their sequences' ids after any history, and only new ids are written."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.executors.block_tables import BlockRows, HostBlockTable

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=9).map(tuple)


def rows_of(table_SB, block_ids) -> list[tuple[int, ...]]:
    return [tuple(row[: len(ids)].tolist()) for row, ids in zip(table_SB, block_ids, strict=True)]


@given(steps=st.lists(st.lists(IDS, min_size=1, max_size=5), max_size=8))
def test_rows_hold_the_ids_after_any_history(steps):
    table = HostBlockTable()
    for block_ids in steps:
        table_SB = table.update(block_ids)
        assert table_SB.dtype == torch.int64
        assert table_SB.shape == (len(block_ids), max(map(len, block_ids)))
        assert rows_of(table_SB, block_ids) == block_ids


@given(
    steps=st.lists(st.tuples(st.dictionaries(st.integers(0, 4), IDS), st.booleans()), max_size=8)
)
def test_changes_by_seat_keep_a_table_elsewhere_up_to_date(steps):
    rows, written = BlockRows(), np.full((5, 9), -1)
    for block_ids, fails in steps:
        for seat, first, ids in rows.changes(block_ids, block_ids.values()):
            if not fails:
                written[seat, first : first + len(ids)] = ids
        if fails:
            rows.forget(block_ids)
            continue
        for seat, ids in block_ids.items():
            assert tuple(written[seat, : len(ids)]) == ids


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
    table = HostBlockTable()
    long, short = tuple(range(1000)), (7, 8)
    table.update([long, short, long])
    # one more id fits without growing
    table._ids_SB = writes = CountedWrites(table._ids_SB)
    # equal ids in another tuple
    table.update([(*long,), short, long])
    assert writes.count == 0
    grown = [(*long, 1), (*short, 2, 3), long]
    assert rows_of(table.update(grown), grown) == grown
    assert writes.count == 3
    # blocks that only drafts needed go, and others come
    shrunk = [long, (*short, 2), long]
    assert rows_of(table.update(shrunk), shrunk) == shrunk
    assert writes.count == 3
    table.update([(*long, 2), (*short, 2), long])
    assert writes.count == 3 + 1
    # another sequence takes the row
    other = [short, (*short, 2, 3)]
    assert rows_of(table.update(other), other) == other
    assert writes.count == 3 + 1 + 2 + 1


def test_the_table_is_a_view_that_does_not_copy():
    table = HostBlockTable()
    table.update([(1, 2, 3), (4,)])
    first = table.update([(1, 2, 3), (4,)])
    assert first.data_ptr() == table.update([(1, 2)]).data_ptr()
