"""Sums with row patches: the reference, and every native build against it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops import operations, reference
from memory_ops.native.backend import NativeBackend
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import PatchUse, TokenPatches
from tests.memory_ops.builds import each_build
from tests.memory_ops.table_kinds import check_close

NUM_ROWS = 50


def patch(num_rows: int, width: int, dtype=torch.float32) -> PatchedRows:
    """A patch of some rows of the table."""
    rows_P = torch.randperm(NUM_ROWS)[:num_rows].sort().values
    return PatchedRows(rows_P, torch.randn(num_rows, width).to(dtype))


def lookups(num_tokens: int, num_heads: int = 2, top_k: int = 3):
    rows_THK = torch.randint(0, NUM_ROWS, (num_tokens, num_heads, top_k))
    return rows_THK, torch.randn(rows_THK.shape)


def changed(table_RV, uses):
    """The table in fp64 with patches written into it."""
    table_RV = table_RV.double().clone()
    for one, scale in uses:
        table_RV[one.rows_P] += scale * one.deltas_PV.double()
    return table_RV


def test_the_reference_equals_lookups_in_changed_tables():
    table_RV = torch.randn(NUM_ROWS, 5, dtype=torch.float64)
    sets = [
        [PatchUse(patch(20, 5), 0.5), PatchUse(patch(9, 5), 2.0)],
        [],
        [PatchUse(patch(0, 5), 1)],
    ]
    set_T = torch.tensor([-1, 0, 1, 0, 2, -1, 0], dtype=torch.int32)
    rows_THK, weights_THK = lookups(7)
    plain_TV = reference.gather_rows(table_RV, rows_THK, weights_THK)
    out_TV = plain_TV.clone()
    operations.add_patched_rows(out_TV, rows_THK, weights_THK, TokenPatches(sets, set_T))
    for token, number in enumerate(set_T.tolist()):
        wanted = plain_TV[token]
        if number >= 0:
            table = changed(table_RV, sets[number])
            one = rows_THK[token : token + 1], weights_THK[token : token + 1]
            wanted = reference.gather_rows(table, *one)[0]
        torch.testing.assert_close(out_TV[token], wanted)


@each_build
@given(
    width=st.sampled_from([1, 7, 16, 33, 128, 200, 576, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sizes=st.lists(st.lists(st.sampled_from([0, 1, 20, 50]), max_size=3), min_size=1, max_size=3),
    num_tokens=st.sampled_from([0, 1, 2, 9]),
    top_k=st.sampled_from([1, 5, 130]),
)
def test_native_sums_are_exact(build, width, dtype, sizes, num_tokens, top_k):
    sets = [[PatchUse(patch(size, width, dtype), 0.7) for size in some] for some in sizes]
    set_T = torch.randint(-1, len(sets), (num_tokens,), dtype=torch.int32)
    patches = TokenPatches(sets, set_T)
    rows_THK, weights_THK = lookups(num_tokens, top_k=top_k)
    before_TV = torch.randn(num_tokens, width)
    exact_TV = before_TV.double()
    reference.add_patched_rows(exact_TV, rows_THK, weights_THK, patches)
    out_TV = before_TV.clone()
    NativeBackend(build).add_patched_rows(out_TV, rows_THK, weights_THK, patches)
    check_close(out_TV, exact_TV, 3 * 2 * top_k + 1)
    # tokens without patches keep every bit
    assert torch.equal(out_TV[set_T < 0], before_TV[set_T < 0])


@each_build
def test_a_token_has_the_same_sum_in_any_company(build):
    sets = [[PatchUse(patch(30, 576), 1.0), PatchUse(patch(30, 576), -0.5)]]
    rows_THK, weights_THK = lookups(40)
    patches = TokenPatches(sets, torch.randint(-1, 1, (40,), dtype=torch.int32))
    out_TV = torch.randn(40, 576)
    parts = [out_TV[t : t + 1].clone() for t in range(40)]
    native = NativeBackend(build)
    native.add_patched_rows(out_TV, rows_THK, weights_THK, patches)
    for t, part in enumerate(parts):
        of_t = slice(t, t + 1)
        native.add_patched_rows(part, rows_THK[of_t], weights_THK[of_t], patches.part(t, t + 1))
    assert torch.equal(torch.cat(parts), out_TV)


@each_build
def test_reads_and_hits_are_counted(build):
    backends = (reference, NativeBackend(build))
    # columns of few tokens are shared between threads; hits of one token exceed a native buffer
    for num_tokens, width, top_k in ((1, 1000, 200), (9, 16, 5)):
        rows = torch.randperm(NUM_ROWS)[:20].sort().values
        deltas, twice = torch.randn(20, width), torch.randn(20, width)
        rows_THK, weights_THK = lookups(num_tokens, top_k=top_k)
        set_T = torch.tensor([0, 1, -1] * 3, dtype=torch.int32)[:num_tokens]
        for backend in backends:
            one, both = PatchedRows(rows, deltas), PatchedRows(rows, twice)
            nothing = PatchedRows(rows[:0], deltas[:0])
            sets = [[PatchUse(both, 1.0), PatchUse(one, 2.0)], [PatchUse(both, 1.0)]]
            patches = TokenPatches([[*uses, PatchUse(nothing, 1.0)] for uses in sets], set_T)
            out_TV = torch.zeros(num_tokens, width)
            backend.add_patched_rows(out_TV, rows_THK, weights_THK, patches)
            for used, by in ((one, set_T == 0), (both, set_T >= 0), (nothing, set_T >= 0)):
                hits = torch.isin(rows_THK[by], used.rows_P).sum()
                assert used.counts.tolist() == [rows_THK[by].numel(), hits]


def test_wrong_shapes_are_refused():
    patches = TokenPatches([[PatchUse(patch(3, 4), 1.0)]], torch.zeros(2, dtype=torch.int32))
    rows_THK, weights_THK = lookups(2)
    with pytest.raises(ValueError, match="deltas of 5 values"):
        operations.add_patched_rows(torch.zeros(2, 5), rows_THK, weights_THK, patches)
    with pytest.raises(ValueError, match="for 2 tokens"):
        operations.add_patched_rows(torch.zeros(3, 4), rows_THK, weights_THK, patches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_that_would_be_rounded_are_refused(dtype):
    patches = TokenPatches([[PatchUse(patch(3, 4), 1.0)]], torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"sums: expected float32 or float64, got {dtype}"):
        operations.add_patched_rows(torch.zeros(2, 4, dtype=dtype), *lookups(2), patches)
