"""The index of a patch's rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops.patches import patched_rows
from memory_ops.patches.patched_rows import EMPTY, IS_BF16, PatchedRows


def patched(rows) -> PatchedRows:
    rows_P = torch.as_tensor(rows, dtype=torch.int64)
    return PatchedRows(rows_P, torch.randn(len(rows_P), 3))


def found(patch: PatchedRows, row: int) -> int:
    """The number of a row, or EMPTY, as kernels look it up."""
    size = len(patch.index_I)
    bits = size.bit_length() - 1
    place = (row * patch.factor) % 2**64 >> (64 - bits)
    for probe in range(size):
        number = int(patch.index_I[(place + probe) % size])
        if number == EMPTY or int(patch.rows_P[number]) == row:
            return number
    return EMPTY


@given(st.sets(st.one_of(st.integers(0, 60), st.integers(0, 2**40)), max_size=80))
def test_every_row_is_found_and_no_other(rows):
    patch = patched(sorted(rows))
    assert [found(patch, row) for row in sorted(rows)] == list(range(len(rows)))
    assert all(found(patch, row) == EMPTY for row in range(62) if row not in rows)


def test_half_of_the_places_stay_free():
    patch = patched(range(0, 10_000, 7))
    assert (patch.index_I == EMPTY).sum() * 2 >= len(patch.index_I)
    assert patch.num_bytes == patch.rows_P.nbytes * 5 // 2 + 4 * len(patch.index_I)


def test_rows_on_a_device_have_their_own_counts_and_words():
    patch = patched(range(5))
    patch.counts += 3
    moved = patch.to(torch.device("cpu"))
    assert moved.host_counts.tolist() == [0, 0] and patch.host_counts.tolist() == [3, 3]
    assert not len(patch.to(torch.device("meta")).host_counts)
    words = [moved.rows_P.data_ptr(), moved.deltas_PV.data_ptr(), moved.index_I.data_ptr()]
    bits = len(moved.index_I).bit_length() - 1
    assert moved.words.tolist() == [*words, moved.counts.data_ptr(), patch.factor, bits, 0]
    assert [found(moved, row) for row in range(6)] == [0, 1, 2, 3, 4, EMPTY]
    narrow = PatchedRows(patch.rows_P, patch.deltas_PV.bfloat16())
    assert narrow.words[IS_BF16] == 1


def test_ids_that_collide_for_one_factor_do_not_for_the_next():
    # the rows of one index that begin in its first places
    first = patched(range(0, 200_000, 3))
    bits = len(first.index_I).bit_length() - 1
    home_P = (first.rows_P * first.factor) >> (64 - bits) & (len(first.index_I) - 1)
    rows = first.rows_P[home_P < 400].tolist()
    again = patched(rows)
    assert [found(again, row) for row in rows] == list(range(len(rows)))


def test_no_run_of_taken_places_is_long(monkeypatch):
    # with the factor 1 the place of a row is the high bits of its id
    bits = 10
    apart = [number << (64 - bits) for number in range(300)]
    index_I = np.empty(2**bits, dtype=np.int32)

    def is_fast(ids):
        return patched_rows._fill_index(index_I, np.array(ids, dtype=np.int64), 1)

    assert is_fast(apart[:128]) and not is_fast(apart[:129])  # each row is in its own place
    assert is_fast([*apart[:128], *apart[129:257]])
    # the run around the end of the index
    ends = [(number << (64 - bits)) - 2**64 for number in range(2**bits - 28, 2**bits)]
    assert is_fast([*ends, *apart[:100]]) and not is_fast([*ends, *apart[:101]])
    # 300 rows that begin at one place: another factor is drawn
    drawn = [2**63, 0x9E3779B97F4A7C15]  # the factor 1, and one that spreads such ids
    monkeypatch.setattr(patched_rows.secrets, "randbits", lambda count: drawn.pop(0))
    ids = range(0, 300 << 20, 1 << 20)
    patch = patched(ids)
    assert not drawn and [found(patch, row) for row in ids] == list(range(300))


def test_more_rows_than_the_index_can_number_are_an_error():
    rows_P = torch.zeros(1, dtype=torch.int64).expand(2**31)
    with pytest.raises(AssertionError, match="int32 numbers"):
        PatchedRows(rows_P, torch.empty(2**31, 0))


@pytest.mark.parametrize(
    ("rows", "deltas", "named"),
    [
        (torch.tensor([1, 1]), torch.zeros(2, 3), "rows"),
        (torch.tensor([2, 1]), torch.zeros(2, 3), "rows"),
        (torch.tensor([-1, 1]), torch.zeros(2, 3), "rows"),
        (torch.tensor([1, 2], dtype=torch.int32), torch.zeros(2, 3), "rows"),
        (torch.tensor([1, 2]), torch.zeros(3, 3), "deltas"),
        (torch.tensor([1, 2]), torch.zeros(2, 3).double(), "deltas"),
        (torch.tensor([1, 2]), torch.zeros(3, 2).T, "deltas"),
    ],
)
def test_wrong_rows_are_refused(rows, deltas, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        PatchedRows(rows, deltas)
