"""The strict interpreter raises on each error that it checks for."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    values = tl.load(source_ptr + places, mask=places < size, other=0)
    tl.store(target_ptr + places, values, mask=places < size)


@triton.jit
def _multiply(target_ptr, factor):
    tl.store(target_ptr, tl.load(target_ptr) * factor)


@triton.jit
def _sum_without_other(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(target_ptr, tl.sum(tl.load(source_ptr + places, mask=places < size), axis=0))


@triton.jit
def _round(source_ptr, target_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(target_ptr + places, tl.load(source_ptr + places).to(tl.bfloat16))


@triton.jit
def _add(source_ptr, target_ptr):
    value = tl.load(source_ptr)
    tl.store(target_ptr, value + value)


@triton.jit
def _product(left_ptr, right_ptr, target_ptr):
    rows, columns = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    places = rows * 16 + columns
    product = tl.dot(tl.load(left_ptr + places), tl.load(right_ptr + places))
    tl.store(target_ptr + places, product)


def test_a_load_past_the_end_is_caught():
    source, target = torch.zeros(7), torch.zeros(8)
    _copy[(1,)](source, target, 7, BLOCK=8)
    with pytest.raises(InterpreterError, match="load: 1 of 8 lanes outside"):
        _copy[(1,)](source, target, 8, BLOCK=8)


def test_a_store_past_the_end_is_caught():
    with pytest.raises(InterpreterError, match="store: 1 of 8 lanes outside"):
        _copy[(1,)](torch.zeros(8), torch.zeros(7), 8, BLOCK=8)


def test_a_load_between_two_tensors_is_caught():
    memory = torch.zeros(64)
    with pytest.raises(InterpreterError, match="load: 4 of 8 lanes outside"):
        _copy[(1,)](memory[:4], memory[16:24], 8, BLOCK=8)


def test_int32_overflow_is_caught():
    target = torch.tensor([2**16], dtype=torch.int32)
    _multiply[(1,)](target, 2**14)
    assert target.item() == 2**30
    with pytest.raises(InterpreterError, match="overflow"):
        _multiply[(1,)](target, 2)


def test_a_masked_off_lane_without_a_value_is_nan():
    total = torch.zeros(1)
    _sum_without_other[(1,)](torch.ones(8), total, 8, BLOCK=8)
    assert total.item() == 8
    _sum_without_other[(1,)](torch.ones(8), total, 7, BLOCK=8)
    assert total.isnan().all()


def test_a_masked_off_integer_without_a_value_is_outside_any_table():
    total, places = torch.zeros(1, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    _sum_without_other[(1,)](places, total, 3, BLOCK=4)
    assert total.item() == 3 + 0x5A5A5A5A5A5A5A5A


def test_bf16_rounds_to_the_nearest():
    # halfway between two bf16 numbers, just above halfway, infinity, NaN
    source = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -torch.inf, torch.nan])
    source = torch.cat([source, torch.randn(3)])
    target = torch.zeros(8, dtype=torch.bfloat16)
    _round[(1,)](source, target, BLOCK=8)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_arithmetic_is_refused():
    with pytest.raises(InterpreterError, match="bf16 arithmetic"):
        _add[(1,)](torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16))


def test_bf16_sums_are_refused():
    with pytest.raises(InterpreterError, match="bf16 arithmetic"):
        _sum_without_other[(1,)](torch.ones(8, dtype=torch.bfloat16), torch.zeros(1), 8, BLOCK=8)


def test_bf16_products_have_exact_factors():
    left, right = torch.randn(2, 16, 16).bfloat16()
    target = torch.zeros(16, 16)
    _product[(1,)](left, right, target)
    torch.testing.assert_close(target, left.float() @ right.float())
