"""The kernel of row patches against the reference in fp64."""

import gc

import pytest
import torch
from triton.runtime.errors import InterpreterError

from memory_ops import operations, reference, triton_kernels
from memory_ops.patches.device_patches import DevicePatches
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import PatchUse, TokenPatches
from memory_ops.triton_kernels.add_patched_rows import add_device_patches
from tests.memory_ops.patches.test_token_patches import lookups, patch
from tests.memory_ops.table_kinds import check_close

DTYPES = (torch.float32, torch.bfloat16)


def check(width: int, sets, set_T, shape: tuple[int, int]):
    """Compare sums, counts, and the bits of tokens without patches."""
    patches = TokenPatches(sets, torch.tensor(set_T, dtype=torch.int32))
    rows_THK, weights_THK = lookups(len(set_T), *shape)
    before_TV = torch.randn(len(set_T), width)
    exact_TV, out_TV = before_TV.double(), before_TV.clone()
    distinct = {id(use.patch): use.patch for uses in sets for use in uses}.values()
    reference.add_patched_rows(exact_TV, rows_THK, weights_THK, patches)
    counts = [one.counts.tolist() for one in distinct]
    triton_kernels.add_patched_rows(out_TV, rows_THK, weights_THK, patches)
    check_close(out_TV, exact_TV, 3 * shape[0] * shape[1] + 1)
    assert torch.equal(out_TV[patches.set_T < 0], before_TV[patches.set_T < 0])
    assert [one.counts.tolist() for one in distinct] == [[2 * n for n in pair] for pair in counts]


# 99 fills no wide load; 520 takes two blocks of columns, the last one partly filled
@pytest.mark.parametrize(
    "width", [520, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 99, 1024))]
)
@pytest.mark.parametrize("dtype", DTYPES)
# one row; more rows than a program looks up at once
@pytest.mark.parametrize("shape", [(1, 1), (3, 33)])
def test_sums_equal_the_reference(width, dtype, shape):
    uses = [PatchUse(patch(size, width, dtype), scale) for size, scale in ((30, 0.7), (50, -2.0))]
    other = PatchUse(patch(20, width, torch.float32), 1.5)
    nothing = PatchUse(patch(0, width, dtype), 1.0)
    sets = [uses, [other], [*uses, other, nothing], []]
    check(width, sets, [-1, 0, 1, 2, 0, 3, -1, 2], shape)


def test_every_row_of_a_large_patch_is_found():
    rows_P = torch.cat((torch.arange(0, 9000, 3), torch.arange(2**40, 2**40 + 500)))
    one = PatchedRows(rows_P, torch.arange(1.0, 3501.0)[:, None])
    rows_THK = torch.cat((rows_P[::7], rows_P[-500:] + 500, torch.arange(1, 500, 3)))[None, None]
    numbers = torch.arange(1.0, 3501.0, 7)
    weights = torch.cat((torch.ones(len(numbers)), torch.full((667,), torch.nan)))
    out = torch.zeros(1, 1)
    patches = TokenPatches([[PatchUse(one, 1.0)]], torch.zeros(1, dtype=torch.int32))
    operations_on_triton(out, rows_THK, weights.view(rows_THK.shape), patches)
    check_close(out, numbers.double().sum().view(1, 1), 3500)
    assert one.counts.tolist() == [rows_THK.numel(), len(numbers)]


def operations_on_triton(*operands):
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("memory_ops.backends._for_device_type", lambda _: triton_kernels)
        operations.add_patched_rows(*operands)


def test_a_token_has_the_same_sum_in_any_company():
    sets = [[PatchUse(patch(30, 19), 1.0), PatchUse(patch(30, 19, torch.bfloat16), -0.5)]]
    rows_THK, weights_THK = lookups(5)
    patches = TokenPatches(sets, torch.tensor([0, -1, 0, 0, -1], dtype=torch.int32))
    out_TV = torch.randn(5, 19)
    parts = [out_TV[t : t + 1].clone() for t in range(5)]
    triton_kernels.add_patched_rows(out_TV, rows_THK, weights_THK, patches)
    for t, part in enumerate(parts):
        of_t = slice(t, t + 1)
        one = rows_THK[of_t], weights_THK[of_t], patches.part(t, t + 1)
        triton_kernels.add_patched_rows(part, *one)
    assert torch.equal(torch.cat(parts), out_TV)


def test_padding_and_patches_of_other_tables_are_not_counted():
    one = patch(30, 16)
    rows_THK, weights_THK = lookups(4)
    patches = DevicePatches(
        spans_T2=torch.tensor([[0, 2], [2, 3], [0, 2], [2, 3]]),
        addresses_U=torch.tensor([0, one.words.data_ptr(), 0]),
        scales_U=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        num_counted_1=torch.tensor([2]),
    )
    out_TV = torch.zeros(4, 16)
    add_device_patches(out_TV, rows_THK, weights_THK, patches)
    expected_TV = torch.zeros(4, 16)
    sets = TokenPatches([[PatchUse(one, 2.0)]], torch.tensor([0, -1, 0, -1], dtype=torch.int32))
    found = one.counts.tolist()
    reference.add_patched_rows(expected_TV, rows_THK, weights_THK, sets)
    check_close(out_TV, expected_TV, 12)
    assert found == [6, int(torch.isin(rows_THK[0], one.rows_P).sum())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_and_layout(dtype):
    rows_THK, weights_THK = (one.transpose(0, 2) for one in lookups(3, 2, 5))
    patches = TokenPatches([[PatchUse(patch(40, 16), 1.0)]], torch.zeros(5, dtype=torch.int32))
    weights_THK = weights_THK.to(dtype)
    exact_TV, out_TV = torch.zeros(5, 16, dtype=torch.float64), torch.zeros(5, 16)
    reference.add_patched_rows(exact_TV, rows_THK, weights_THK, patches)
    triton_kernels.add_patched_rows(out_TV, rows_THK, weights_THK, patches)
    check_close(out_TV, exact_TV, 6)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 1, 0)])
def test_an_empty_lookup_adds_nothing(shape):
    patches = TokenPatches([[PatchUse(patch(9, 8), 1.0)]], torch.zeros(shape[0], dtype=torch.int32))
    out = torch.ones(shape[0], 8)
    rows = torch.zeros(shape, dtype=torch.int64)
    triton_kernels.add_patched_rows(out, rows, torch.zeros(shape), patches)
    assert torch.equal(out, torch.ones(shape[0], 8))


def test_a_freed_patch_is_noticed_here():
    one = patch(9, 8)
    addresses = torch.tensor([one.words.data_ptr()])
    patches = DevicePatches(
        torch.tensor([[0, 1]]), addresses, torch.ones(1).double(), torch.tensor([1])
    )
    operands = torch.zeros(1, 8), *lookups(1)
    add_device_patches(*operands, patches)
    del one
    gc.collect()
    with pytest.raises(InterpreterError, match="outside every tensor"):
        add_device_patches(*operands, patches)


def test_wrong_operands_are_refused():
    rows_THK, weights_THK = lookups(1)
    token = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="deltas of 5 values"):
        patches = TokenPatches([[PatchUse(patch(3, 4), 1.0)]], token)
        triton_kernels.add_patched_rows(torch.zeros(1, 5), rows_THK, weights_THK, patches)
    elsewhere = patch(3, 5).to(torch.device("meta"))
    patches = TokenPatches([[PatchUse(elsewhere, 1.0)]], token)
    with pytest.raises(ValueError, match="patches: expected rows on cpu"):
        triton_kernels.add_patched_rows(torch.zeros(1, 5), rows_THK, weights_THK, patches)
