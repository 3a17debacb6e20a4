"""The kernel that rotates heads and writes KV blocks, against its twin and the model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import InterpreterError

from engine.executors.cuda.kernels import rotate_and_store as module
from engine.executors.cuda.kernels.kv_formats import fp8_codes_reference
from engine.executors.cuda.kernels.rotate_and_store import (
    rotate_and_store,
    rotate_and_store_reference,
)
from engine.model.attention import write_kv
from engine.model.layout import PagedKv, TokenLayout
from engine.model.rotary import rope_angles, rope_frequencies, rotate
from tests.conftest import TOLERANCE
from tests.kernel_tools.planted_faults import with_fault

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_BLOCKS = 9
NUM_POSITIONS = 5000
UNWRITTEN = 0x5A


def operands(
    num_tokens: int,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor, int]:
    """Random heads in rows of wider ones, positions, angles of all positions, KV slots, poisoned
    blocks, number of heads."""
    width = (num_heads + 2 * num_kv_heads) * head_dim
    wide_TF = torch.full((num_tokens, width + 16), torch.nan, dtype=dtype)
    wide_TF[:, :width] = torch.randn(num_tokens, width)
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,))
    angles = rope_angles(torch.arange(NUM_POSITIONS), rope_frequencies(head_dim, 10000.0, None))
    kv_slots = torch.randperm(NUM_BLOCKS * block_size)[:num_tokens]
    shape = (2 * NUM_BLOCKS, 2, num_kv_heads, block_size, head_dim)
    blocks = torch.full(shape, UNWRITTEN if fp8 else torch.nan, dtype=torch.uint8 if fp8 else dtype)
    return wide_TF[:, :width], positions, angles, kv_slots, blocks[::2], num_heads


def twin_check(kernel, *args, has_norm: bool = False, **kwargs) -> None:
    qkv, *places, blocks, num_heads = operands(*args, **kwargs)
    expected_qkv, expected_blocks = qkv.clone(), blocks.clone()
    close = {"rtol": 0, "atol": 0, "equal_nan": True}
    norm = None
    if has_norm:
        norm = torch.rand(2, blocks.shape[4]).to(qkv.dtype) + 0.5, 1e-5
        # sums in another order may round a value to its neighbour
        rtol, atol = TOLERANCE[qkv.dtype]
        close |= {"rtol": rtol, "atol": atol}
    expected = rotate_and_store_reference(expected_qkv, *places, expected_blocks, num_heads, norm)
    q_THE = kernel(qkv, *places, blocks, num_heads, norm)
    torch.testing.assert_close(q_THE, expected, **close)
    # keys and values stay as they are, KV slots of other tokens too
    torch.testing.assert_close(qkv, expected_qkv, **close)
    if has_norm and blocks.dtype == torch.uint8:
        # neighbouring codes
        assert int((blocks.int() - expected_blocks.int()).abs().max()) <= 1
    else:
        torch.testing.assert_close(blocks, expected_blocks, **close)
    assert q_THE.data_ptr() == qkv.data_ptr()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [7, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_results_equal_those_of_the_twin(num_tokens, dtype, fp8, has_norm):
    twin_check(rotate_and_store, num_tokens, dtype=dtype, fp8=fp8, has_norm=has_norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_does_as_the_model(dtype):
    qkv, positions, table, kv_slots, blocks, num_heads = operands(40, dtype=dtype)
    # bit by bit those of the table
    angles = rope_angles(positions, rope_frequencies(32, 10000.0, None))
    q, k, v = qkv.clone().unflatten(1, (-1, 32)).split((num_heads, 2, 2), dim=1)
    layout = TokenLayout(positions, (0, 40), PagedKv(kv_slots, kv_slots.view(1, -1), (40,)))
    expected = blocks.clone()
    write_kv(rotate(k, angles), v, layout, expected)
    rotated = rotate_and_store_reference(qkv, positions, table, kv_slots, blocks, num_heads)
    assert torch.equal(rotated, rotate(q, angles))
    torch.testing.assert_close(blocks, expected, rtol=0, atol=0, equal_nan=True)


@given(
    num_tokens=st.integers(0, 9),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 128),
    block_size=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    fp8=st.booleans(),
    has_norm=st.booleans(),
)
def test_any_shape(num_tokens, heads, half, block_size, dtype, fp8, has_norm):
    group, num_kv_heads = heads
    shape = num_tokens, group * num_kv_heads, num_kv_heads, 2 * half, block_size, dtype, fp8
    twin_check(rotate_and_store, *shape, has_norm=has_norm)


def stored_codes(values: Tensor) -> Tensor:
    """The fp8 codes that the kernel writes for values: each row becomes a value head of 256."""
    values = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
    qkv = torch.cat((torch.zeros(len(values), 512, dtype=values.dtype), values), dim=1)
    blocks = torch.zeros(len(values), 2, 1, 1, 256, dtype=torch.uint8)
    angles = torch.ones(1, 1, 128), torch.zeros(1, 1, 128)
    kv_slots = torch.arange(len(values))
    rotate_and_store(qkv, torch.zeros_like(kv_slots), angles, kv_slots, blocks, 1)
    return blocks[:, 1].flatten()


@pytest.mark.slow
def test_every_bf16_value_becomes_its_fp8_code():
    # with infinities, which saturate
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    codes, is_nan = stored_codes(values), values.isnan()
    assert torch.equal(codes[~is_nan], fp8_codes_reference(values)[~is_nan])
    # a NaN of either sign
    assert (codes[is_nan] & 0x7F == 0x7F).all()


def test_fp32_values_between_codes_round_to_the_nearest_even_code():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    nearby = [halves, halves.nextafter(halves + 1), halves.nextafter(halves - 1), codes]
    values = torch.cat((*nearby, torch.tensor([447.9, 448.1, 463.9, 464.0, 465.0, 1e30, 1e-30])))
    values = torch.cat((values, -values))
    assert torch.equal(stored_codes(values)[: len(values)], fp8_codes_reference(values))


FAULTS = {
    "angles are those of the token's row": (
        "tl.load(positions_ptr + token) * HALF",
        "token * HALF",
    ),
    "the sine has the wrong sign": ("first * cos - second * sin", "first * cos + second * sin"),
    "values are rotated": (
        "(heads < NUM_HEADS + NUM_KV_HEADS)",
        "(heads < NUM_HEADS + 2 * NUM_KV_HEADS)",
    ),
    "keys are rotated in place": ("mask=mask & is_query)\n    if", "mask=mask)\n    if"),
    "an offset is a block": ("+ kv_slot % BLOCK_SIZE", "+ kv_slot % (BLOCK_SIZE - 1)"),
    "keys are those of the query heads": ("(heads - NUM_HEADS) *", "(heads - 1) *"),
    "the next head is written": (
        "(heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None]",
        "(heads <= NUM_HEADS + 2 * NUM_KV_HEADS)[:, None]",
    ),
    "keys have the norm of queries": ("norm_ptr + (heads >= NUM_HEADS)", "norm_ptr + (heads < 0)"),
    "values are normalised": (
        "first = tl.where(rotates, _weighted",
        "first = tl.where(mask, _weighted",
    ),
    "the mean is a sum": ("squares / (2 * HALF)", "squares"),
    "fp8 codes are truncated": ("fp8_codes(new_first.to", "fp8_codes(0.97 * new_first.to"),
}


def full_check(kernel) -> None:
    twin_check(kernel, 20)
    twin_check(kernel, 20, has_norm=True)
    twin_check(kernel, 20, dtype=torch.bfloat16, fp8=True)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, tmp_path):
    full_check(rotate_and_store)
    faulty = with_fault(module, *FAULTS[fault], tmp_path)
    with pytest.raises((AssertionError, InterpreterError)):
        full_check(faulty.rotate_and_store)


def test_unsupported_operands_are_refused():
    names = "qkv", "positions", "angles", "kv_slots", "blocks", "num_heads", "norm"
    right = dict(zip(names, (*operands(4), (torch.ones(2, 32), 1e-5)), strict=True))
    qkv, blocks, (cos, sin) = right["qkv"], right["blocks"], right["angles"]
    for changed, message in (
        ({"qkv": qkv.half()}, "kv_blocks: expected torch.float16 or torch.uint8"),
        ({"qkv": qkv[:, :-2]}, "qkv: expected rows of 320 contiguous values"),
        ({"blocks": blocks.transpose(2, 3)}, "qkv|kv_blocks: expected"),
        ({"positions": right["positions"][:3]}, "positions: expected a contiguous int64"),
        ({"kv_slots": right["kv_slots"].int()}, "kv_slots: expected a contiguous int64"),
        ({"angles": (cos, sin.double())}, "angles: expected contiguous fp32"),
        ({"angles": (cos[:3], sin)}, "angles: expected contiguous fp32"),
        ({"norm": (torch.ones(2, 31), 1e-5)}, "norm: expected contiguous"),
        ({"norm": (torch.ones(2, 32).bfloat16(), 1e-5)}, "norm: expected contiguous torch.float32"),
        ({"norm": (torch.ones(2, 64)[:, ::2], 1e-5)}, "norm: expected contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate_and_store(*(right | changed).values())
