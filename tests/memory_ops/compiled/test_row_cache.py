"""Budgets of the row cache's kernels: registers, spills, and copies of 128 bits per lane."""

import pytest
import torch

from memory_ops.anonymous import anonymous_zeros
from memory_ops.triton_kernels.fetch_rows import fetch_rows
from memory_ops.triton_kernels.place_rows import NUM_COUNTS, CacheSets, place_rows
from memory_ops.triton_kernels.sort_rows import SortedRows, sort_rows
from tests.kernel_tools.machine_code import TARGETS, check, compiled, per_target, targets

# by is_hint and number of ways; limits as in test_budgets
PLACE_BUDGETS = {
    (False, 16): ((120, 64), (96, 64), (112, 64), (80, 64)),
    (True, 16): ((112, 64), (96, 64), (96, 64), (80, 64)),
}
# by number of references
SORT_BUDGETS = {
    (1024,): ((48, 2048), (48, 2048), (48, 2048), (40, 128)),
    (1,): ((48, 2048), (48, 2048), (48, 2048), (40, 128)),
}
# by words per row and bits per word
FETCH_BUDGETS = {
    (512, 32): ((32, 0), (32, 0), (32, 0), (32, 0)),
    (500, 32): ((32, 0), (32, 0), (32, 0), (32, 0)),
    (999, 16): ((32, 0), (32, 0), (32, 0), (32, 0)),
}
WORDS = {32: torch.int32, 16: torch.int16}


def sets_of(num_sets: int, num_ways: int) -> CacheSets:
    tags = torch.full((num_sets, num_ways), -1)
    return CacheSets(tags, torch.zeros_like(tags))


def counts() -> torch.Tensor:
    return torch.zeros(NUM_COUNTS, dtype=torch.int64)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(PLACE_BUDGETS))
def test_place_rows(case, target, budget):
    is_hint, num_ways = case
    sets, wanted = sets_of(64, num_ways), SortedRows(torch.arange(1024), torch.arange(1024))
    figures = compiled(TARGETS[target], lambda: place_rows(sets, wanted, counts(), is_hint=is_hint))
    check(figures, budget, wide_loads=0)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(SORT_BUDGETS))
def test_sort_rows(case, target, budget):
    figures = compiled(TARGETS[target], lambda: sort_rows(torch.arange(*case)))
    check(figures, budget, wide_loads=0)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(FETCH_BUDGETS))
def test_fetch_rows(case, target, budget):
    width, bits = case
    # a large table: AMD uses other loads from 2**31 bytes on
    words = anonymous_zeros((2**31 // width + 1, width), WORDS[bits])
    keys = torch.zeros(1024, dtype=torch.int64)
    memory = torch.zeros(64, width, dtype=WORDS[bits])
    figures = compiled(TARGETS[target], lambda: fetch_rows(words, keys, keys, memory))
    assert not figures.spills and not figures.barriers
    assert figures.registers <= budget[0] and figures.shared <= budget[1], figures
    if bits == 32:
        check(figures, budget, wide_loads=1)


@pytest.mark.parametrize("target", targets(["sm_90", "gfx942"]))
@pytest.mark.parametrize("is_hint", [False, True])
def test_one_row_of_one_set_of_one_way_compiles(target, is_hint):
    # triton turns a size of 1 into a constant, which takes another code path
    sets, row = sets_of(1, 1), torch.zeros(1, dtype=torch.int64)
    wanted = SortedRows(row, row)
    for is_first in (True, False):
        figures = compiled(
            TARGETS[target],
            lambda first=is_first: place_rows(
                sets, wanted, counts(), is_hint=is_hint, is_first=first
            ),
        )
        assert not figures.spills
