"""The Triton backend: interpreted and compiled in subprocesses, and run on a GPU if present."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memory_ops import reference
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import PatchUse, TokenPatches
from memory_ops.sparse_adam import AdamMoments
from tests.kernel_tools.processes import run_tests
from tests.memory_ops.table_kinds import KINDS, check_close, exact_values, table_of
from tests.memory_ops.test_sparse_adam import MOMENTS, STEP, check_moments, doubled, moments, reads

FOLDER = Path(__file__).parent


def test_the_kernels_in_the_strict_interpreter(tmp_path):
    status, output = run_tests(
        [FOLDER / "interpreted"], tmp_path, "-m", "not slow", TRITON_INTERPRET="1"
    )
    assert status == 0, output


@pytest.mark.slow
def test_the_kernels_compiled(tmp_path):
    status, output = run_tests(
        [FOLDER / "compiled"], tmp_path, "-m", "not slow", MEMPLUS_COMPILE_TESTS="1"
    )
    assert status == 0, output


@pytest.mark.slow
def test_more_cases_in_the_strict_interpreter(tmp_path):
    options = ("-m", "slow or hypothesis", "--hypothesis-profile", "some")
    status, output = run_tests([FOLDER / "interpreted"], tmp_path, *options, TRITON_INTERPRET="1")
    assert status == 0, output


@pytest.mark.slow
def test_more_kernels_compiled(tmp_path):
    status, output = run_tests(
        [FOLDER / "compiled"], tmp_path, "-m", "slow", MEMPLUS_COMPILE_TESTS="1"
    )
    assert status == 0, output


def test_importing_the_operations_does_not_import_triton():
    code = "import sys, memory_ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parent.parent).returncode == 0


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def kernels():
    """The backend, imported only by tests that run on a GPU."""
    pytest.importorskip("triton")
    from memory_ops import triton_kernels

    return triton_kernels


def to_gpu(table):
    """The table, plain or records, on the GPU."""
    if isinstance(table, torch.Tensor):
        return table.cuda()
    return type(table)(table.records_RB.cuda(), table.row_format, table.value_dim)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("num_subkeys", "top_k"), [(2, 1), (37, 5), (100, 64), (128, 128), (1000, 32), (65536, 32)]
)
def test_topk_on_a_gpu(kernels, num_subkeys, top_k):
    # a few whole numbers tie; random numbers do not
    tied = torch.randint(-3, 4, (9, 4, 2, num_subkeys)).float()
    for scores in (tied, torch.randn(tied.shape), torch.full(tied.shape, -torch.inf)):
        rows, weights = kernels.product_topk(scores.cuda(), top_k)
        wanted, wanted_weights = reference.product_topk(scores, top_k)
        assert torch.equal(rows.cpu(), wanted)
        torch.testing.assert_close(weights.cpu(), wanted_weights)


@pytest.mark.gpu
@on_gpu
def test_nan_gives_rows_in_range_on_a_gpu(kernels):
    scores = torch.randn(9, 4, 2, 1500)
    scores[torch.rand(scores.shape) < 0.3] = torch.nan
    scores[0] = torch.nan
    rows, weights = kernels.product_topk(scores.cuda(), 6)
    assert rows.min() >= 0 and rows.max() < 1500**2
    assert weights.isnan().all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("width", [1, 64, 99, 1000, 1024])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("home", ["device", "pinned"])
def test_rows_on_a_gpu(kernels, kind, width, home):
    table, x = table_of(kind, torch.randn(500, width)), torch.randn(33, width)
    rows, weights = torch.randint(0, 500, (33, 3, 7)), torch.rand(33, 3, 7)
    operand = to_gpu(table)
    if home == "pinned":
        # read in place over the bus
        memory = table if isinstance(table, torch.Tensor) else table.records_RB
        pinned = memory.pin_memory()
        operand = pinned if memory is table else type(table)(pinned, table.row_format, width)
    out = kernels.gather_rows(operand, rows.cuda(), weights.cuda())
    check_close(out.cpu(), reference.gather_rows(exact_values(table), rows, weights), 21)
    dots = kernels.row_dots(operand, rows.cuda(), x.cuda())
    check_close(dots.cpu(), reference.row_dots(exact_values(table), rows, x), width)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("width", [1, 99, 1024])
@pytest.mark.parametrize("num_rows", [3, 5000])
def test_gradients_on_a_gpu(kernels, width, num_rows):
    rows, weights = torch.randint(0, num_rows, (63, 3, 7)), torch.rand(63, 3, 7)
    grad = torch.randn(63, width)
    distinct, sums = kernels.row_gradients(rows.cuda(), weights.cuda(), grad.cuda())
    wanted, exact = reference.row_gradients(rows, weights, grad.double())
    assert torch.equal(distinct.cpu(), wanted)
    check_close(sums.cpu(), exact, rows.numel())
    assert torch.equal(kernels.row_gradients(rows.cuda(), weights.cuda(), grad.cuda())[1], sums)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (3, 99), (5000, 1024)])
def test_sparse_adam_on_a_gpu(kernels, kind, num_rows, width):
    # few rows have enough reads to be summed in parts
    rows, weights, grad = reads(num_rows, width, 700, 3, 7)
    table, state = torch.randn(num_rows, width), moments(num_rows, width, kind)
    exact, exact_state = table.double(), doubled(state)
    reference.sparse_adam(
        exact, exact_state, reference.group_rows(rows, weights), grad.double(), STEP
    )
    found = []
    for _ in range(2):
        on_gpu = AdamMoments(*(None if one is None else one.cuda() for one in state))
        table_on_gpu, grad_on_gpu = table.cuda(), grad.cuda()
        groups = kernels.group_rows(rows.cuda(), weights.cuda())
        norm = kernels.squared_norm(groups, grad_on_gpu)
        kernels.sparse_adam(table_on_gpu, on_gpu, groups, grad_on_gpu, STEP)
        found.append((norm, table_on_gpu, on_gpu))
    (norm, one, its), (again, other, _) = found
    assert torch.equal(one, other) and norm == again
    torch.testing.assert_close(one.cpu(), exact.float(), rtol=1e-4, atol=1e-5)
    check_moments(AdamMoments(*(None if m is None else m.cpu() for m in its)), exact_state)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 99, 1000, 1024])
def test_patches_on_a_gpu(kernels, width, dtype):
    rows_P = torch.randperm(2**20)[:3000].sort().values
    patches = [PatchedRows(rows_P, torch.randn(3000, width).to(dtype)) for _ in range(2)]
    patches.append(PatchedRows(rows_P[::3].clone(), torch.randn(1000, width)))
    sets = [[PatchUse(patches[0], 0.5)], [PatchUse(one, 1.5) for one in patches]]
    set_T = torch.tensor([0, -1, 1] * 100, dtype=torch.int32)
    rows = torch.where(torch.rand(300, 3, 7) < 0.4, rows_P[:21].view(3, 7), 5)
    weights, before = torch.rand(300, 3, 7), torch.randn(300, width)
    exact = before.double()
    reference.add_patched_rows(exact, rows, weights, TokenPatches(sets, set_T))
    moved = {id(one): one.to(torch.device("cuda")) for one in patches}
    on_gpu = [[PatchUse(moved[id(use.patch)], use.scale) for use in uses] for uses in sets]
    out = before.cuda()
    kernels.add_patched_rows(out, rows.cuda(), weights.cuda(), TokenPatches(on_gpu, set_T))
    check_close(out.cpu(), exact, 3 * 21 + 1)
    assert torch.equal(out[set_T < 0].cpu(), before[set_T < 0])
    for one in patches:
        assert moved[id(one)].counts.tolist() == one.counts.tolist()


@pytest.mark.gpu
@on_gpu
def test_a_pageable_table_is_refused(kernels):
    rows = torch.zeros(1, 1, 1, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed"):
        kernels.gather_rows(torch.zeros(4, 8), rows, torch.ones(1, 1, 1, device="cuda"))


@pytest.mark.gpu
@pytest.mark.slow
@on_gpu
def test_offsets_pass_2_to_the_31_on_a_gpu(kernels):
    table = torch.zeros(2**31 // 64 + 3, 64, dtype=torch.bfloat16, device="cuda")
    table[-3:] = torch.randn(3, 64)
    rows, weights = torch.randint(0, 3, (5, 1, 4)), torch.rand(5, 1, 4)
    out = kernels.gather_rows(table, (rows + len(table) - 3).cuda(), weights.cuda())
    check_close(out.cpu(), reference.gather_rows(table[-3:].cpu().double(), rows, weights), 4)
