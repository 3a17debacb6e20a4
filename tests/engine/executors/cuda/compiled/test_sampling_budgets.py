"""Budgets of the sampling kernels: registers, shared memory, spills, wide loads of logits."""

from dataclasses import replace

import pytest
import torch

from engine.executors.cuda.kernels import choose_tokens as choosing
from engine.executors.cuda.kernels.add_biases import add_biases
from engine.executors.cuda.kernels.block_table import update_block_table
from tests.kernel_tools.machine_code import TARGETS, Figures, check, compiled, per_target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# by dtype and V: upper limits (registers per lane, shared bytes per program) for each of TARGETS,
# with the compiler that constraints.txt names; 16 warps of a program on NVIDIA have 128 registers
CHOICE_BUDGETS = {
    ("bf16", 128_256): ((96, 128), (96, 128), (120, 128), (64, 128)),
    ("fp32", 128_256): ((104, 256), (104, 256), (128, 256), (64, 128)),
}
SLOW_CHOICE_BUDGETS = {
    ("fp16", 128_256): ((104, 128), (96, 128), (120, 128), (64, 128)),
    ("bf16", 49_152): ((96, 128), (104, 128), (112, 128), (64, 128)),
    ("fp32", 49_152): ((128, 256), (104, 256), (128, 256), (64, 128)),
}
# rows that no wide load fits, and rows of one tile
OTHER_CHOICE_BUDGETS = {
    ("bf16", 50_257): ((120, 512), (104, 512), (128, 512), (48, 256)),
    ("bf16", 260): ((64, 32), (64, 32), (64, 32), (40, 32)),
    ("fp32", 1): ((48, 64), (48, 64), (40, 64), (32, 32)),
}
# by dtype of the logits
BIAS_BUDGETS = {
    ("fp32",): ((16, 0), (16, 0), (16, 0), (8, 0)),
    ("bf16",): ((16, 0), (16, 0), (16, 0), (8, 0)),
}
# by columns of the table
TABLE_BUDGETS = {
    (128,): ((16, 0), (16, 0), (16, 0), (8, 0)),
    (1,): ((16, 0), (16, 0), (16, 0), (8, 0)),
}
# passes over a row: the largest, two searches, the total of top_p, the sums of tiles, one tile
PASSES = 6


def choice_of(logits_LV: torch.Tensor, target: str) -> Figures:
    rows_L = torch.zeros(len(logits_LV), dtype=torch.int64)
    choices_L5 = torch.zeros(len(logits_LV), 5, dtype=torch.float64)
    figures = compiled(
        TARGETS[target],
        lambda: choosing.choose_tokens(logits_LV, choices_L5, rows_L, rows_L, rows_L),
    )
    # the block of the chosen token has fewer logits than the program has lanes
    is_narrow = logits_LV.dtype != torch.float32 and figures.narrow_loads > 0
    return replace(figures, narrow_loads=figures.narrow_loads - is_narrow)


def without_narrow(figures: Figures) -> Figures:
    return replace(figures, narrow_loads=0)


def wide_loads(dtype: str, target: str) -> int:
    """Loads of 128 bits: a lane has eight logits of a tile on NVIDIA; AMD's has four."""
    a_pass = {"fp32": 1} if target == "gfx942" else {"fp32": 2, "bf16": 1, "fp16": 1}
    return PASSES * a_pass.get(dtype, 0)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(CHOICE_BUDGETS))
def test_choose_tokens(case, target, budget):
    dtype, vocab_size = case
    figures = choice_of(torch.zeros(4, vocab_size, dtype=DTYPES[dtype]), target)
    check(figures, budget, wide_loads(dtype, target))


@pytest.mark.parametrize(("case", "target", "budget"), per_target(SLOW_CHOICE_BUDGETS))
def test_choose_tokens_of_more_kinds(case, target, budget):
    dtype, vocab_size = case
    figures = choice_of(torch.zeros(4, vocab_size, dtype=DTYPES[dtype]), target)
    check(figures, budget, wide_loads(dtype, target))


@pytest.mark.parametrize(("case", "target", "budget"), per_target(OTHER_CHOICE_BUDGETS))
def test_choose_tokens_of_other_vocabularies(case, target, budget):
    dtype, vocab_size = case
    figures = choice_of(torch.zeros(4, vocab_size, dtype=DTYPES[dtype]), target)
    check(without_narrow(figures), budget, wide_loads=0)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(BIAS_BUDGETS))
def test_add_biases(case, target, budget):
    logits_LV = torch.zeros(4, 1000, dtype=DTYPES[case[0]])
    places_N, count_1 = torch.zeros(300, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    figures = compiled(
        TARGETS[target], lambda: add_biases(logits_LV, places_N, torch.zeros(300), count_1)
    )
    # scattered logits of 16 bits
    check(without_narrow(figures), budget, wide_loads=0)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(TABLE_BUDGETS))
def test_update_block_table(case, target, budget):
    block_table_PB = torch.zeros(64, *case, dtype=torch.int32)
    updates_N3, count_1 = torch.zeros(300, 3, dtype=torch.int64), torch.tensor([0])
    figures = compiled(
        TARGETS[target], lambda: update_block_table(block_table_PB, updates_N3, count_1)
    )
    check(figures, budget, wide_loads=0)


def test_the_number_of_rows_compiles_nothing():
    # triton compiles integers of 1 and multiples of 16 apart
    caches = choosing._choose_tokens.device_caches
    counts = []
    for num_rows in (3, 1, 16):
        choice_of(torch.zeros(num_rows, 64), "sm_90")
        counts.append(sum(len(kernels) for kernels, *_ in caches.values()))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_check_rejects_a_row_stride_that_no_wide_load_fits(target):
    figures = choice_of(torch.zeros(4, 49_153, dtype=torch.bfloat16)[:, :49_152], target)
    with pytest.raises(AssertionError, match="loads are narrow"):
        check(figures, (512, 2**16), wide_loads=PASSES)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_check_rejects_more_warps_than_registers(target, monkeypatch):
    # 32 warps have 64 registers per lane
    monkeypatch.setattr(choosing, "_MOST_WARPS", 32)
    figures = choice_of(torch.zeros(4, 128_256, dtype=torch.bfloat16), target)
    with pytest.raises(AssertionError, match="spills"):
        check(figures, (512, 2**16), wide_loads=0)
