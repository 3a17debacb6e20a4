"""Products with weights of 8 and 4 bits in every runnable build against fp64."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.cpu.packing import Packer
from engine.model.grouped_layers import GroupedLinear
from engine.model.grouped_weights import GroupFormat, group_weights
from engine.model.norm import RmsNorm
from engine.model.weight_bits import GROUP
from tests.conftest import TOLERANCE

each_build = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
FORMATS = [GroupFormat(8), GroupFormat(4), GroupFormat(4, has_minimums=True)]
each_format = pytest.mark.parametrize("group_format", FORMATS, ids=str)
ROOT = Path(__file__).parents[4]
# rows of one group, and the conversions of C++ that they must not need
EXTREME_ROWS = """
#include <cmath>
#include <vector>
#include "engine/executors/cpu/native/weight_groups.h"

int main() {
  for (float extreme : {NAN, INFINITY, -INFINITY, 1e-45f, 1e-38f, 3e-37f})
    for (float most : {127.f, 16256.f, 65535.f}) {
      memplus::floats x[memplus::GROUP / memplus::LANES] = {};
      float* values = (float*)x;
      values[0] = 1e-38f, values[1] = extreme, values[2] = -extreme;
      memplus::ints sum{};
      const float scale = memplus::round_values(
          x, memplus::GROUP, most,
          [&](int64_t, int64_t, memplus::ints integers) { sum |= integers; });
      for (int lane = 0; lane < memplus::LANES; lane++)
        if (sum[lane]) return 1;
      if (std::isnan(scale) == std::isfinite(extreme)) return 2;
    }
  // as many outliers as a row can have, squares that vanish, and squares that are infinite
  memplus::PackedLinear linear{};
  linear.inputs = 259, linear.weight_bits = 8;
  const struct { float value; int64_t every, found; } ROWS[] = {
      {1, 17, 16}, {3.8e-23f, 3, 0}, {1e20f, 100, 0}, {NAN, 100, 0}, {INFINITY, 100, 0}};
  for (const auto& row : ROWS) {
    std::vector<float> x(linear.inputs);
    for (int64_t i = 0; i < linear.inputs; i += row.every) x[i] = row.value;
    std::vector<int32_t> groups(linear.row_bytes() / 4);  // exactly as long: the sanitizer looks
    uint8_t* to = (uint8_t*)groups.data();
    memplus::round_row<memplus::Fp32Values>((const uint8_t*)x.data(), linear, to);
    if (memplus::RowGroups(to, linear.steps()).num_outliers() != row.found) return 3;
  }
}
"""
SIZES = st.integers(1, 100)
ROWS = st.one_of(st.integers(0, 30), st.integers(40, 110))


def layer(inputs, outputs, group_format, *, bias=False):
    made = GroupedLinear(inputs, outputs, group_format, bias=bias)
    groups = group_weights(torch.randn(outputs, inputs) * inputs**-0.5, group_format.bits)
    if group_format.has_minimums:
        # about as large as the weights without minimums
        groups = groups._replace(minimums_OG=groups.scales_OG * -7.3)
    for name, tensor in groups.tensors.items():
        getattr(made, name).data = tensor
    if bias:
        torch.nn.init.normal_(made.bias)
    return made.requires_grad_(False)


def rows_with_outliers(rows, inputs):
    x_TI = torch.randn(rows, inputs)
    x_TI[::3, inputs // 2] *= 50
    return x_TI


def norm(size, dtype):
    made = RmsNorm(size, 1e-5)
    torch.nn.init.uniform_(made.weight, 0.5, 1.5)
    return made.to(dtype).requires_grad_(False)


def rounded(x_TI, group_format):
    """Rows rounded to 8 bits in groups, as the kernels do, in fp64; 8-bit weights keep outliers."""
    inputs = x_TI.shape[1]
    squares_TI = x_TI.double().square()
    is_outlier_TI = squares_TI > 16 * squares_TI.mean(dim=1, keepdim=True)
    outliers_TI = x_TI.double() * is_outlier_TI if group_format.bits == 8 else torch.zeros(1)
    wide_TGI = (x_TI.double() - outliers_TI).float()
    wide_TGI = torch.nn.functional.pad(wide_TGI, (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))
    most_TG1 = wide_TGI.abs().amax(dim=2, keepdim=True)
    # torch multiplies a number by a reciprocal, which rounds twice, but divides tensors exactly
    factors_TG1 = torch.full_like(most_TG1, 127) / most_TG1
    integers_TGI = (wide_TGI * factors_TG1.nan_to_num(posinf=0.0)).round()
    return (integers_TGI.double() * (most_TG1 / 127)).flatten(1)[:, :inputs] + outliers_TI


def exact(x_TI, layers, *, before=None, is_gated=False):
    x_TI = rounded(x_TI if before is None else before(x_TI), layers[0].group_format)
    outs = []
    for one in layers:
        bias = 0 if one.bias is None else one.bias.double()
        outs.append(x_TI @ one.dense(torch.float64).T + bias)
    return silu(outs[0]) * outs[1] if is_gated else torch.cat(outs, dim=1)


def run(build, x_TI, layers, *, before=None, is_gated=False, residual=None):
    kernels = CpuKernels(build)
    packed = Packer(kernels, x_TI.dtype).linear(*layers, norm=before, is_gated=is_gated)
    return kernels.linear(packed, x_TI, residual)


def check(found, wanted):
    rtol, atol = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=rtol * 10, atol=atol * 10)


@each_build
@each_dtype
@each_format
@given(data=st.data())
def test_layers_over_one_input_are_one_product(build, dtype, group_format, data):
    rows, inputs = data.draw(ROWS), data.draw(SIZES)
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    has_bias, has_residual = data.draw(st.booleans()), data.draw(st.booleans())
    layers = [layer(inputs, size, group_format, bias=has_bias) for size in sizes]
    x = rows_with_outliers(rows, inputs).to(dtype)
    residual = torch.randn(rows, sum(sizes)).to(dtype) if has_residual else None
    wanted = exact(x, layers) + (0 if residual is None else residual.double())
    check(run(build, x, layers, residual=residual), wanted)


@each_build
@each_format
@given(rows=ROWS, inputs=SIZES, outputs=SIZES)
def test_a_gate_multiplies_the_up_projection_of_normed_rows(
    build, group_format, rows, inputs, outputs
):
    layers = [layer(inputs, outputs, group_format) for _ in range(2)]
    x, before = torch.randn(rows, inputs), norm(inputs, torch.float32)
    found = run(build, x, layers, before=before, is_gated=True)
    # a norm that differs in the last bit may round an input to the next integer
    wanted = exact(x, layers, before=before, is_gated=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)


@each_build
@each_dtype
@each_format
def test_bits_of_a_row_do_not_depend_on_its_batch(build, dtype, group_format):
    layers = [layer(70, 90, group_format, bias=True)]
    x, residual = rows_with_outliers(131, 70).to(dtype), torch.randn(131, 90).to(dtype)
    whole = run(build, x, layers, residual=residual)
    for first, last in ((0, 1), (5, 6), (0, 2), (3, 16), (100, 131), (20, 120)):
        some = run(build, x[first:last], layers, residual=residual[first:last])
        assert torch.equal(some, whole[first:last])


@each_build
@each_format
def test_nan_does_not_affect_other_rows(build, group_format):
    layers = [layer(40, 40, group_format)]
    x = rows_with_outliers(20, 40)
    wanted = run(build, x, layers)
    x[7, 3], x[8, 0], x[9] = torch.nan, torch.inf, 0.0
    found = run(build, x, layers)
    assert found[7].isnan().all() and not found[8].isfinite().any() and not found[9].any()
    others = [i for i in range(20) if i not in (7, 8, 9)]
    assert torch.equal(found[others], wanted[others])


@each_build
@each_dtype
@each_format
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1e-37])
def test_values_too_small_for_a_scale_are_zeros(build, dtype, group_format, value):
    x = torch.zeros(3, 2 * GROUP, dtype=dtype)
    x[1, 5], x[1, 7] = value, -value
    x[2, GROUP:] = 1.0
    alone = x.clone()
    x[2, 3] = value
    one = layer(2 * GROUP, 40, group_format)
    found = run(build, x, [one])
    assert not found[:2].any() and torch.equal(found[2], run(build, alone, [one])[2])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_extreme_rows_are_rounded_without_undefined_behaviour(tmp_path):
    (tmp_path / "rows.cpp").write_text(EXTREME_ROWS)
    checks = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    command = ["g++", "-std=c++17", "-pthread", "-Wno-psabi", *checks, f"-I{ROOT}"]
    subprocess.run([*command, "rows.cpp", "-o", "rows"], cwd=tmp_path, check=True)
    found = subprocess.run([tmp_path / "rows"], stderr=subprocess.PIPE, text=True)
    assert found.returncode == 0, found.stderr


@each_format
def test_builds_give_nearly_the_same_sums(group_format):
    layers, x = [layer(200, 50, group_format)], torch.randn(9, 200)
    first, *others = (run(build, x, layers) for build in CPU_LIBRARY.runnable_builds)
    for other in others:
        torch.testing.assert_close(other, first)


@each_build
@each_dtype
def test_outliers_cost_other_inputs_no_precision(build, dtype):
    one = layer(8 * GROUP + 3, 60, GroupFormat(8))
    x = torch.randn(12, 8 * GROUP + 3).to(dtype)
    x[:, 70], x[1:, -1] = 1000.0, -900.0
    x[5, :3], x[6] = 500.0, 0.0
    x[6, ::17] = 1.0  # as many as there can be: 16 of 259
    found = run(build, x, [one])
    # one rounding to 8 bits would leave errors of up to 4 per input
    wanted = x.double() @ one.dense(torch.float64).T
    rtol = 2e-3 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=2e-2)
    for row in range(12):
        assert torch.equal(run(build, x[row : row + 1], [one])[0], found[row])


@each_build
def test_extreme_integers_are_summed_exactly(build):
    one = layer(64, 1, GroupFormat(8))
    one.weight.data.fill_(-128)
    one.weight_scales.data.fill_(1.0)
    x = torch.full((1, 64), 127.0)
    assert run(build, x, [one]).item() == run(build, -x, [one]).item() * -1 == -128 * 127 * 64
