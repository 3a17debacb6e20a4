"""Linear layers as one product: every build that runs here against its twin in plain torch."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear, silu

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.cpu.packing import Packer
from engine.model.config import MemoryConfig
from engine.model.memory_layer import MemoryLayer, half_scores
from engine.model.norm import RmsNorm
from tests.conftest import TOLERANCE

each_build = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
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


@dataclass
class Product:
    """Layers over one input, computed in plain torch and by packed weights."""

    layers: tuple
    norm: RmsNorm | None = None
    is_gated: bool = False

    def by_torch(self, x, residual=None):
        if self.norm is not None:
            x = self.norm(x)
        outs = [linear(x, one.weight, getattr(one, "bias", None)) for one in self.layers]
        out = silu(outs[0]) * outs[1] if self.is_gated else torch.cat(outs, dim=-1)
        return out if residual is None else residual + out

    def exact(self, x, residual=None):
        """In fp64; only what the norm rounds is rounded alike."""
        if self.norm is not None:
            x = self.norm(x)
        layers = tuple(copy.deepcopy(one).double() for one in self.layers)
        wide = Product(layers, None, self.is_gated)
        return wide.by_torch(x.double(), None if residual is None else residual.double())

    def packed(self, build):
        kernels = CpuKernels(build)
        packer = Packer(kernels, self.layers[0].weight.dtype)
        packed = packer.linear(*self.layers, norm=self.norm, is_gated=self.is_gated)
        return partial(kernels.linear, packed)


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
    product = Product(tuple(layer(inputs, n, has_bias, dtype) for n in sizes), before)
    x = torch.randn(rows, inputs).to(dtype)
    residual = torch.randn(rows, sum(sizes)).to(dtype) if has_residual else None
    wanted = product.exact(x, residual)
    check(product.by_torch(x, residual), wanted, dtype, inputs)
    check(product.packed(build)(x, residual), wanted, dtype, inputs)


@each_build
@each_dtype
@given(rows=ROWS, inputs=SIZES, outputs=SIZES, has_bias=st.booleans())
def test_a_gate_is_applied_to_what_stands_beside_it(build, dtype, rows, inputs, outputs, has_bias):
    parts = tuple(layer(inputs, outputs, has_bias, dtype) for _ in range(2))
    product = Product(parts, norm(inputs, dtype), is_gated=True)
    x = torch.randn(rows, inputs).to(dtype)
    check(product.packed(build)(x), product.exact(x), dtype, inputs)


@each_build
@each_dtype
def test_a_row_is_bit_for_bit_the_same_in_any_company(build, dtype):
    product = Product((layer(70, 90, True, dtype),), norm(70, dtype)).packed(build)
    x, residual = torch.randn(131, 70).to(dtype), torch.randn(131, 90).to(dtype)
    whole = product(x, residual)
    for first, last in ((0, 1), (5, 6), (0, 2), (3, 16), (100, 131), (20, 120)):
        some = product(x[first:last], residual[first:last])
        assert torch.equal(some, whole[first:last])


@each_build
def test_rows_may_lie_apart_and_the_arguments_stay(build):
    product = Product((layer(24, 40, False, torch.bfloat16),)).packed(build)
    wide, residual = torch.randn(9, 60).bfloat16(), torch.randn(9, 40).bfloat16()
    before = wide.clone(), residual.clone()
    out = product(wide[:, 8:32], residual)
    assert torch.equal(out, product(wide[:, 8:32].contiguous(), residual))
    assert torch.equal(wide, before[0]) and torch.equal(residual, before[1])


@each_build
@each_dtype
def test_what_is_not_a_number_stays_in_its_row(build, dtype):
    product = Product((layer(40, 40, False, dtype),)).packed(build)
    x = torch.randn(20, 40).to(dtype)
    wanted = product(x)
    x[7, 3], x[8, 0] = torch.nan, torch.inf
    found = product(x)
    assert found[7].isnan().all() and not found[8].isfinite().any()
    others = [i for i in range(20) if i not in (7, 8)]
    assert torch.equal(found[others], wanted[others])


@each_build
def test_an_embeddings_rows_give_logits_and_layers_stay_as_they_are(build):
    linear, embedding = layer(8, 8, True, torch.float32), nn.Embedding(10, 8)
    embedding.requires_grad_(False)
    before = copy.deepcopy(linear.weight), copy.deepcopy(embedding.weight)
    x = torch.randn(3, 8)
    Product((linear,)).packed(build)
    found = Product((embedding,)).packed(build)(x)
    torch.testing.assert_close(found, x @ embedding.weight.T)
    assert torch.equal(linear.weight, before[0]) and torch.equal(embedding.weight, before[1])


@each_build
@each_dtype
@given(
    rows=ROWS,
    shape=st.tuples(st.integers(1, 4), st.just(2), st.integers(1, 70), st.integers(1, 40)),
    has_norm=st.booleans(),
)
def test_scores_of_product_keys(build, dtype, rows, shape, has_norm):
    num_heads, _, num_subkeys, half_dim = shape
    sizes = {"num_subkeys": num_subkeys, "top_k": 1, "query_dim": 2 * half_dim, "value_dim": 4}
    memory = MemoryLayer(MemoryConfig(num_heads, **sizes, qk_norm=has_norm), "pkm", 4, 1e-5)
    nn.init.normal_(memory.subkeys)
    if has_norm:
        nn.init.uniform_(memory.query_norm, 0.5, 1.5)
    memory.to(dtype).requires_grad_(False)
    queries = torch.randn(rows, num_heads * 2 * half_dim).to(dtype)
    wanted = half_scores(queries, memory.subkeys, memory.query_norm, memory.norm_eps)
    kernels = CpuKernels(build)
    found = kernels.linear(Packer(kernels, dtype).subkeys(memory), queries).view(wanted.shape)
    assert found.dtype == torch.float32
    # a norm in bf16 may be rounded to the other neighbour where its sum differs in the last bit
    rtol, atol = (1e-2, 5e-2) if has_norm and dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


@each_build
@each_dtype
@given(rows=ROWS, size=SIZES)
def test_silu_gate(build, dtype, rows, size):
    gate, x = torch.randn(rows, size).to(dtype), torch.randn(rows, size)
    wanted = torch.nn.functional.silu(gate.double()) * x.double()
    check(CpuKernels(build).silu_gate(gate, x), wanted, dtype, 1)
