"""Linear layers as one product: every build that runs here against its twin in plain torch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine import ops
from engine.model.norm import RmsNorm
from engine.ops.linear import linear_by_torch
from engine.ops.native.library import OPS_LIBRARY, NativeOps
from engine.ops.product_keys import half_scores_by_torch
from tests.conftest import TOLERANCE

each_build = pytest.mark.parametrize("build", OPS_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SIZES = st.integers(1, 70)
ROWS = st.one_of(st.integers(0, 30), st.integers(40, 110))


def layer(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias)
    # outputs of the order of 1, whatever the number of inputs
    nn.init.normal_(made.weight, std=inputs**-0.5)
    if bias:
        nn.init.normal_(made.bias)
    return made.to(dtype).requires_grad_(False)


def norm(size: int, dtype: torch.dtype) -> RmsNorm:
    made = RmsNorm(size, 1e-5)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    return made.to(dtype).requires_grad_(False)


def exact(x, projection, residual=None):
    """The product in fp64; only what the norm rounds is rounded alike."""
    if projection.norm is not None:
        x = projection.norm(x)
    layers = [copy.deepcopy(part).double() for part in projection.layers]
    wide = ops.Projection(*layers, is_gated=projection.is_gated)
    return linear_by_torch(x.double(), wide, None if residual is None else residual.double())


def packed(projection, build):
    """The projection packed by one build."""
    projection.pack(NativeOps(build))
    return projection


def check(found, wanted, dtype, terms):
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(
        found.double(), wanted.to(found.dtype).double(), rtol=rtol * 10, atol=atol * terms**0.5
    )


@each_build
@each_dtype
@given(data=st.data())
def test_layers_over_one_input_are_one_product(build, dtype, data):
    rows, inputs = data.draw(ROWS), data.draw(SIZES)
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    has_norm, has_bias, has_residual = (data.draw(st.booleans()) for _ in range(3))
    before = norm(inputs, dtype) if has_norm else None
    projection = ops.Projection(*(layer(inputs, n, has_bias, dtype) for n in sizes), norm=before)
    x = torch.randn(rows, inputs).to(dtype)
    residual = torch.randn(rows, sum(sizes)).to(dtype) if has_residual else None
    wanted = exact(x, projection, residual)
    check(linear_by_torch(x, projection, residual), wanted, dtype, inputs)
    packed(projection, build)
    check(ops.linear(x, projection, residual), wanted, dtype, inputs)


@each_build
@each_dtype
@given(rows=ROWS, inputs=SIZES, outputs=SIZES, has_bias=st.booleans())
def test_a_gate_is_applied_to_what_stands_beside_it(build, dtype, rows, inputs, outputs, has_bias):
    parts = [layer(inputs, outputs, has_bias, dtype) for _ in range(2)]
    projection = ops.Projection(*parts, norm=norm(inputs, dtype), is_gated=True)
    x = torch.randn(rows, inputs).to(dtype)
    wanted = exact(x, projection)
    packed(projection, build)
    check(ops.linear(x, projection), wanted, dtype, inputs)


@each_build
@each_dtype
def test_a_row_is_bit_for_bit_the_same_in_any_company(build, dtype):
    projection = ops.Projection(layer(70, 90, True, dtype), norm=norm(70, dtype))
    packed(projection, build)
    x, residual = torch.randn(131, 70).to(dtype), torch.randn(131, 90).to(dtype)
    whole = ops.linear(x, projection, residual)
    for first, last in ((0, 1), (5, 6), (0, 2), (3, 16), (100, 131), (20, 120)):
        some = ops.linear(x[first:last], projection, residual[first:last])
        assert torch.equal(some, whole[first:last])


@each_build
def test_rows_may_lie_apart_and_the_arguments_stay(build):
    projection = packed(ops.Projection(layer(24, 40, False, torch.bfloat16)), build)
    wide, residual = torch.randn(9, 60).bfloat16(), torch.randn(9, 40).bfloat16()
    before = wide.clone(), residual.clone()
    out = ops.linear(wide[:, 8:32], projection, residual)
    assert torch.equal(out, ops.linear(wide[:, 8:32].contiguous(), projection, residual))
    assert torch.equal(wide, before[0]) and torch.equal(residual, before[1])


@each_build
@each_dtype
def test_what_is_not_a_number_stays_in_its_row(build, dtype):
    projection = packed(ops.Projection(layer(40, 40, False, dtype)), build)
    x = torch.randn(20, 40).to(dtype)
    wanted = ops.linear(x, projection)
    x[7, 3], x[8, 0] = torch.nan, torch.inf
    found = ops.linear(x, projection)
    assert found[7].isnan().all() and not found[8].isfinite().any()
    others = [i for i in range(20) if i not in (7, 8)]
    assert torch.equal(found[others], wanted[others])


@each_build
def test_packed_layers_give_their_weights_up_and_an_embedding_keeps_its(build):
    linear, embedding = layer(8, 8, True, torch.float32), nn.Embedding(10, 8)
    embedding.requires_grad_(False)
    packed(ops.Projection(linear), build)
    head = ops.Projection(embedding)
    x = torch.randn(3, 8)
    wanted = x @ embedding.weight.T
    packed(head, build)
    assert linear.weight is None and embedding.weight.shape == (10, 8)
    torch.testing.assert_close(ops.linear(x, head), wanted)


class Owner(nn.Module):
    """Subkeys, and a norm of the query halves."""

    norm_eps = 1e-5

    def __init__(self, shape, has_norm: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.subkeys = nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False)
        weight = torch.rand(2, shape[3]).to(dtype) + 0.5
        self.query_norm = nn.Parameter(weight, requires_grad=False) if has_norm else None


@each_build
@each_dtype
@given(
    rows=ROWS,
    shape=st.tuples(st.integers(1, 4), st.just(2), st.integers(1, 70), st.integers(1, 40)),
    has_norm=st.booleans(),
)
def test_scores_of_product_keys(build, dtype, rows, shape, has_norm):
    owner = Owner(shape, has_norm, dtype)
    keys = ops.ProductKeys(owner)
    queries = torch.randn(rows, shape[0] * 2 * shape[3]).to(dtype)
    wanted = half_scores_by_torch(queries, keys)
    keys.pack(NativeOps(build))
    found = ops.half_scores(queries, keys)
    assert found.dtype == torch.float32 and owner.subkeys is None
    # a norm in bf16 may be rounded to the other neighbour where its sum differs in the last bit
    rtol, atol = (1e-2, 5e-2) if has_norm and dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


@each_build
@each_dtype
@given(rows=ROWS, size=SIZES)
def test_silu_gate(build, dtype, rows, size):
    gate, x = torch.randn(rows, size).to(dtype), torch.randn(rows, size)
    wanted = torch.nn.functional.silu(gate.double()) * x.double()
    check(NativeOps(build).silu_gate(gate, x), wanted, dtype, 1)
