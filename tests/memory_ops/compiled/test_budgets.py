"""Budgets of all shipped kernel launches: registers, shared memory, spills, wide loads."""

from collections.abc import Callable

import pytest
import torch

from memory_ops import reference
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import PatchUse, TokenPatches
from memory_ops.triton_kernels import (
    add_patched_rows,
    gather_rows,
    product_topk,
    row_dots,
    row_gradients,
    sparse_adam,
)
from memory_ops.triton_kernels.add_patched_rows import WIDE_LAUNCH
from memory_ops.triton_kernels.copy_rows import copy_rows
from memory_ops.triton_kernels.gather_rows import GATHER_LAUNCHES
from memory_ops.triton_kernels.launch import RowLaunch
from memory_ops.triton_kernels.product_topk import TILES_LAUNCH, TOPK_LAUNCHES, launch_for
from memory_ops.triton_kernels.row_dots import DOT_LAUNCHES
from memory_ops.triton_kernels.segment_sums import GRADIENT_LAUNCHES
from tests.kernel_tools.machine_code import (
    TARGETS,
    all_compiled,
    check,
    compiled,
    per_target,
    targets,
)
from tests.memory_ops.compiled.bad_kernels import ROWS, gather_of_run_time_width
from tests.memory_ops.table_kinds import KINDS, PLAIN, table_of, vast_table
from tests.memory_ops.test_sparse_adam import STEP, moments

# by kind and V: upper limits (registers per lane, shared bytes per program) for each of TARGETS,
# with the compiler that constraints.txt names; GPUs allocate registers in multiples of eight
GATHER_BUDGETS = {
    ("fp32", 1024): ((168, 512), (168, 512), (160, 512), (96, 512)),
    ("fp16", 1024): ((96, 512), (96, 512), (96, 512), (96, 512)),
    ("bf16", 1024): ((96, 512), (96, 512), (96, 512), (88, 512)),
    ("bf16", 1000): ((96, 512), (96, 512), (96, 512), (88, 512)),
    ("int8", 1024): ((128, 512), (128, 512), (128, 512), (160, 512)),
    ("int8", 999): ((128, 512), (128, 512), (128, 512), (152, 512)),
    ("fp8", 1024): ((128, 512), (128, 512), (144, 512), (168, 512)),
    ("int4", 1024): ((128, 512), (128, 512), (128, 512), (112, 512)),
    ("int4", 999): ((128, 512), (128, 512), (128, 512), (112, 512)),
    ("int4_row", 1024): ((128, 512), (128, 512), (152, 512), (88, 512)),
    ("int4_row", 999): ((128, 512), (128, 512), (152, 512), (88, 512)),
}
DOT_BUDGETS = {
    ("fp32", 1024): ((80, 0), (72, 0), (72, 0), (56, 0)),
    ("fp16", 1024): ((80, 0), (80, 0), (72, 0), (48, 0)),
    ("bf16", 1024): ((72, 0), (72, 0), (80, 0), (56, 0)),
    ("bf16", 1000): ((80, 0), (72, 0), (80, 0), (56, 0)),
    ("int8", 1024): ((64, 2048), (72, 512), (72, 512), (64, 2048)),
    ("int8", 999): ((96, 2048), (64, 2048), (64, 2048), (80, 2048)),
    ("fp8", 1024): ((64, 2048), (72, 512), (80, 512), (64, 2048)),
    ("int4", 1024): ((64, 0), (64, 0), (64, 0), (72, 0)),
    ("int4", 999): ((64, 512), (64, 512), (64, 512), (72, 512)),
    ("int4_row", 1024): ((72, 0), (72, 0), (72, 0), (72, 0)),
    ("int4_row", 999): ((72, 512), (72, 512), (72, 512), (72, 512)),
}
GRADIENT_BUDGETS = {
    ("fp32", 1024): ((64, 0), (64, 0), (64, 0), (64, 0)),
    ("fp16", 1024): ((64, 0), (80, 0), (80, 0), (64, 0)),
    ("bf16", 1024): ((64, 0), (80, 0), (80, 0), (64, 0)),
    ("bf16", 1000): ((72, 0), (72, 0), (64, 0), (64, 0)),
}
# by kind of the moments, kind of the gradient and V
ADAM_BUDGETS = {
    ("fp32", "fp32", 1024): ((64, 0), (64, 0), (64, 0), (48, 0)),
    ("bf16", "fp32", 1024): ((64, 0), (64, 0), (64, 0), (48, 0)),
    ("bf16", "bf16", 1000): ((72, 0), (80, 0), (64, 0), (64, 0)),
    ("row_wise", "bf16", 1000): ((72, 0), (80, 0), (64, 0), (64, 0)),
}
# by V
PATCH_BUDGETS = {
    (1024,): ((64, 8192), (64, 8192), (64, 8192), (88, 16384)),
    (1000,): ((64, 8192), (64, 8192), (64, 8192), (96, 16384)),
}
# by N and K
TOPK_BUDGETS = {
    (100, 7): ((56, 0), (56, 0), (56, 0), (40, 0)),
    (256, 32): ((48, 1024), (48, 1024), (48, 1024), (40, 1024)),
}
SLOW_TOPK_BUDGETS = {
    (512, 32): ((72, 2048), (64, 2048), (64, 2048), (56, 1024)),
    (8192, 32): ((128, 4096), (112, 4096), (112, 4096), (112, 2048)),
    (1024, 32): ((80, 4096), (72, 4096), (72, 4096), (56, 2048)),
    (128, 128): ((64, 8192), (64, 8192), (64, 8192), (64, 8192)),
    (65536, 128): ((128, 16384), (128, 16384), (128, 16384), (160, 8192)),
    (1000, 100): ((104, 16384), (80, 16384), (104, 16384), (72, 8192)),
    (1500, 64): ((104, 16384), (64, 16384), (96, 16384), (64, 8192)),
    (2048, 32): ((64, 8192), (64, 8192), (80, 8192), (56, 4096)),
}


def wide_row_loads(launch: RowLaunch, kind: str, target: str) -> int:
    """Number of 128-bit loads per lane that one tile of a program needs."""
    bits = {"fp32": 32, "int4": 32, "int4_row": 32, "fp16": 16, "bf16": 16}.get(kind, 8)
    lanes = launch.num_warps * TARGETS[target].warp_size
    return launch.rows * launch.columns * bits // (128 * lanes)


def lookups(num_tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights of a paper-sized layer: 4 heads, 32 rows each."""
    return torch.randint(0, 64, (num_tokens, 4, 32)), torch.rand(num_tokens, 4, 32)


def test_every_shipped_launch_is_compiled_here():
    assert {kind for kind, _ in GATHER_BUDGETS} == set(GATHER_LAUNCHES)
    assert {kind for kind, _ in DOT_BUDGETS} == set(DOT_LAUNCHES)
    assert {kind for kind, _ in GRADIENT_BUDGETS} == set(GRADIENT_LAUNCHES)
    # with few candidates, N alone selects the launch
    launches = {
        (launch := launch_for(num_subkeys, 2), num_subkeys > launch.block)
        for num_subkeys, _ in TOPK_BUDGETS | SLOW_TOPK_BUDGETS
    }
    assert launches == {(TILES_LAUNCH, True), *((launch, False) for launch in TOPK_LAUNCHES)}


@pytest.mark.parametrize(("case", "target", "budget"), per_target(GATHER_BUDGETS))
def test_gather_rows(case, target, budget):
    kind, width = case
    # a large table: AMD uses other loads from 2**31 bytes on
    table = vast_table(kind, torch.randn(1, width))
    figures = compiled(TARGETS[target], lambda: gather_rows(table, *lookups()))
    check(figures, budget, wide_row_loads(GATHER_LAUNCHES[kind], kind, target))


@pytest.mark.parametrize(("case", "target", "budget"), per_target(DOT_BUDGETS))
def test_row_dots(case, target, budget):
    kind, width = case
    table, x = vast_table(kind, torch.randn(1, width)), torch.randn(16, width)
    figures = compiled(TARGETS[target], lambda: row_dots(table, lookups()[0], x))
    check(figures, budget, wide_row_loads(DOT_LAUNCHES[kind], kind, target))


@pytest.mark.parametrize(("case", "target", "budget"), per_target(GRADIENT_BUDGETS))
def test_row_gradients(case, target, budget):
    kind, width = case
    grad = torch.randn(16, width).to(PLAIN[kind])
    figures = all_compiled(TARGETS[target], lambda: row_gradients(*lookups(), grad))
    assert len(figures) == 3
    # the first kernel groups the reads, the others sum them
    check(figures[0], (48, 4096), wide_loads=0)
    for one in figures[1:]:
        assert not one.barriers
        check(one, budget, wide_row_loads(GRADIENT_LAUNCHES[kind], kind, target))


@pytest.mark.parametrize(("case", "target", "budget"), per_target(ADAM_BUDGETS))
def test_sparse_adam(case, target, budget):
    moment_kind, kind, width = case
    table, grad = torch.zeros(64, width), torch.randn(16, width).to(PLAIN[kind])
    groups, state = reference.group_rows(*lookups()), moments(64, width, moment_kind)
    figures = all_compiled(TARGETS[target], lambda: sparse_adam(table, state, groups, grad, STEP))
    # chunks, then squares if the moments are one per row, then rows
    assert len(figures) == (3 if moment_kind == "row_wise" else 2)
    for one in figures[1:]:
        assert not one.barriers
        check(one, budget, wide_row_loads(GRADIENT_LAUNCHES[kind], kind, target))


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_copy_rows(kind, target):
    source, copy = vast_table(kind, torch.randn(1, 1024)), torch.zeros(64, 1024).to(PLAIN[kind])
    rows_L = torch.arange(16)
    for direction in ((source, rows_L, copy, rows_L), (copy, rows_L, source, rows_L)):
        figures = compiled(TARGETS[target], lambda operands=direction: copy_rows(*operands))
        assert not figures.barriers
        check(figures, (32, 0), wide_loads=1)


def patch_of(width: int, num_tokens: int = 16) -> tuple[torch.Tensor, TokenPatches]:
    """Sums of tokens that use one patch."""
    patch = PatchedRows(torch.arange(64), torch.randn(64, width))
    set_T = torch.zeros(num_tokens, dtype=torch.int32)
    return torch.zeros(num_tokens, width), TokenPatches([[PatchUse(patch, 1.0)]], set_T)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(PATCH_BUDGETS))
def test_add_patched_rows(case, target, budget):
    out, patches = patch_of(*case)
    figures = compiled(TARGETS[target], lambda: add_patched_rows(out, *lookups(), patches))
    # the kernel has code for deltas of both kinds
    wide_loads = sum(wide_row_loads(WIDE_LAUNCH, kind, target) for kind in ("fp32", "bf16"))
    check(figures, budget, wide_loads)


def topk_of(num_subkeys: int, top_k: int) -> Callable[[], object]:
    scores = torch.randn(2, 4, 2, num_subkeys)
    return lambda: product_topk(scores, top_k)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(TOPK_BUDGETS))
def test_product_topk(case, target, budget):
    # no wide loads required: the kernel reads scores once and spends its time sorting
    check(compiled(TARGETS[target], topk_of(*case)), budget, wide_loads=0)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target", "budget"), per_target(SLOW_TOPK_BUDGETS))
def test_product_topk_of_many_rows(case, target, budget):
    check(compiled(TARGETS[target], topk_of(*case)), budget, wide_loads=0)


@pytest.mark.parametrize("kind", KINDS)
def test_small_tables_that_amd_reads_with_32_bit_offsets(kind):
    table, x = table_of(kind, torch.randn(64, 1024)), torch.randn(16, 1024)
    gathered = compiled(TARGETS["gfx942"], lambda: gather_rows(table, *lookups()))
    dots = compiled(TARGETS["gfx942"], lambda: row_dots(table, lookups()[0], x))
    check(gathered, (248, 8192), wide_row_loads(GATHER_LAUNCHES[kind], kind, "gfx942"))
    check(dots, (168, 8192), wide_row_loads(DOT_LAUNCHES[kind], kind, "gfx942"))


@pytest.mark.parametrize("target", targets(["sm_90", "gfx942"]))
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_one_value_of_one_row_compiles(kind, target):
    # triton turns a size of 1 into a constant, which takes another code path
    table, x = table_of(kind, torch.randn(1, 1)), torch.randn(1, 1)
    rows, weights = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1)
    out, patches = patch_of(1, 1)
    calls = [lambda: gather_rows(table, rows, weights), lambda: row_dots(table, rows, x)]
    if kind in PLAIN:
        calls += [lambda: add_patched_rows(out, rows, weights, patches)]
    assert all(not compiled(TARGETS[target], call).spills for call in calls)
    if kind in PLAIN:
        grouped = all_compiled(
            TARGETS[target], lambda: row_gradients(rows, weights, x.to(PLAIN[kind]))
        )
        assert len(grouped) == 2 and not any(one.spills for one in grouped)


@pytest.mark.parametrize("target", targets())
def test_patches_of_a_width_that_fills_no_wide_load(target):
    out, patches = patch_of(999)
    figures = compiled(TARGETS[target], lambda: add_patched_rows(out, *lookups(), patches))
    assert not figures.spills and figures.registers <= 80 and figures.shared <= 2048


@pytest.mark.parametrize("target", targets(["sm_80", "sm_90", "gfx942"]))
def test_operands_of_less_precision_compile(target):
    # the interpreter accepts code that the compiler refuses, and fp32 operands need no conversion
    table, x = torch.randn(64, 1000).bfloat16(), torch.randn(16, 1000).bfloat16()
    rows, weights = lookups()
    out, patches = patch_of(1000)
    calls = [
        lambda: gather_rows(table, rows, weights.bfloat16()),
        lambda: add_patched_rows(out, rows, weights.bfloat16(), patches),
    ]
    assert all(not compiled(TARGETS[target], call).spills for call in calls)
    grouped = all_compiled(TARGETS[target], lambda: row_gradients(rows, weights.half(), x))
    assert not any(one.spills for one in grouped)
    # a width that fills 128-bit loads of the table also fills those of x
    dots = compiled(TARGETS[target], lambda: row_dots(table, rows, x))
    assert not dots.spills and not dots.narrow_loads


@pytest.mark.parametrize("target", targets(["sm_90", "gfx942"]))
@pytest.mark.parametrize(("num_subkeys", "top_k"), [(1, 1), (2, 1), (2, 2), (5, 3)])
def test_the_smallest_topk_compiles(num_subkeys, top_k, target):
    assert not compiled(TARGETS[target], topk_of(num_subkeys, top_k)).spills


@pytest.mark.parametrize("target", targets())
def test_the_check_rejects_a_width_known_only_at_run_time(target):
    table, rows = torch.randn(64, 1000).bfloat16(), torch.zeros(16, 128, dtype=torch.int64)
    figures = compiled(TARGETS[target], lambda: gather_of_run_time_width(table, rows))
    with pytest.raises(AssertionError, match="loads are narrow"):
        check(figures, (255, 0), wide_loads=ROWS)


@pytest.mark.parametrize("target", targets())
def test_the_check_rejects_more_rows_than_registers(target, monkeypatch):
    # a lane has 255 registers on NVIDIA and 512 on AMD
    too_many = 64 if target.startswith("gfx") else 32
    monkeypatch.setitem(DOT_LAUNCHES, "bf16", RowLaunch(rows=too_many, columns=256))
    table, x = torch.randn(64, 1024).bfloat16(), torch.randn(16, 1024)
    figures = compiled(TARGETS[target], lambda: row_dots(table, lookups()[0], x))
    with pytest.raises(AssertionError, match="spills"):
        check(figures, (512, 2**16), wide_loads=0)
