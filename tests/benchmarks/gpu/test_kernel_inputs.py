"""Calls of kernels and twins on the same inputs, and the error that correctness reports."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.correctness import result_error
from benchmarks.gpu.kernel_inputs import KernelInputs
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import PatchUse, TokenPatches

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    ids: Tensor
    tiles: Tensor | None = None


def test_a_call_returns_results_and_written_arguments_and_a_copy_keeps_its_own():
    def scale(values, step, factor, *, out):
        values.mul_(factor)
        return out.copy_(step.ids)

    values, step = torch.ones(3), Step(torch.arange(2))
    inputs = KernelInputs((values, step, 2), {"out": torch.zeros(2)}, outputs=(0,))
    assert inputs.size == 3 * 4 + 2 * 8 + 2 * 4
    copy = inputs.copied(CPU)
    result, written = inputs.call(scale)
    assert result.tolist() == [0, 1] and written.tolist() == [2, 2, 2]
    assert copy.arguments[0].tolist() == [1, 1, 1] and copy.arguments[1].tiles is None
    assert [one.tolist() for one in copy.call(scale)] == [[0, 1], [2, 2, 2]]


def test_a_copy_of_patches_has_its_own_counts():
    patch = PatchedRows(torch.arange(2), torch.ones(2, 4))
    patches = TokenPatches([[PatchUse(patch, 2.0)]], torch.zeros(1, dtype=torch.int32))
    patch.counts += 1
    (copy,) = KernelInputs((patches,)).copied(CPU).arguments
    ((use,),) = copy.sets
    assert use.scale == 2 and use.patch.counts.tolist() == [0, 0]
    assert torch.equal(use.patch.rows_P, patch.rows_P) and copy.set_T.tolist() == [0]


def test_the_rows_of_a_patch_count_once_in_the_size():
    patch = PatchedRows(torch.arange(2), torch.ones(2, 4))
    sets = [[PatchUse(patch, 2.0)], [PatchUse(patch, 1.0)]]
    set_T = torch.zeros(1, dtype=torch.int32)
    assert KernelInputs((TokenPatches(sets, set_T),)).size == patch.num_bytes + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_multiples_of_what_passes(dtype):
    expected = torch.tensor([0.0, 100.0], dtype=dtype)
    assert result_error(expected, expected) == 0
    assert result_error(expected * 1.001, expected) <= 1 or dtype is torch.float32
    assert result_error(expected * 1.1, expected) > 1
    assert result_error(expected * math.nan, expected) == math.inf


def test_ids_are_equal_or_wrong():
    ids = torch.arange(3)
    assert result_error(ids, ids) == 0 and result_error(ids + 1, ids) == math.inf
