"""Products and attention on the matrix tiles of AMX, emulated on machines without them."""

import ctypes
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from engine.executors.cpu import kernels
from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.cpu.packing import Packer
from memory_ops.native.library import NativeLibrary
from tests.engine.executors.cpu import test_kernels, test_packed_linear, test_weight_groups
from tests.engine.executors.cpu.test_weight_groups import (
    ROOT,
    each_dtype,
    each_format,
    exact,
    layer,
    rows_with_outliers,
)

BUILD = "avx512_amx"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The build for AMX, but with emulated tiles."""
    if shutil.which("g++") is None or "avx512_bf16" not in CPU_LIBRARY.runnable_builds:
        pytest.skip("needs a C++ compiler and a CPU with AVX-512, its bf16 products included")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (module,) = (one for one in project["ext-modules"] if one["name"].endswith(BUILD))
    flags = [one for one in module["extra-compile-args"] if not one.startswith("-mamx")]
    flags += ["-fPIC", "-shared", f"-I{ROOT}", *module["extra-link-args"]]
    library = NativeLibrary(tmp_path_factory.mktemp("emulated"), CPU_LIBRARY.prototypes, "")
    tiles = Path(__file__).with_name("emulated_tiles.h")
    files = ["-include", tiles, ROOT / module["sources"][0], "-o", library._file(BUILD)]
    subprocess.run(["g++", *flags, *files], check=True)
    return library


@pytest.fixture
def build(emulated, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_LIBRARY", emulated)
    return BUILD


def test_the_build_for_amx_multiplies_bytes_on_tiles():
    file = CPU_LIBRARY._file(BUILD)
    if not file.exists():
        pytest.skip("compiled by g++ 12 or later only")
    assert bytes.fromhex("c4e24a5ec4") in file.read_bytes()  # tdpbsud tmm0, tmm4, tmm6


@pytest.mark.slow
@each_dtype
@each_format
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("rows", [16, 17, 32, 45, 131])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (259, 70)])
def test_wide_steps_use_tiles_and_have_the_bits_of_narrow_ones(
    build, dtype, group_format, is_gated, rows, inputs, outputs
):
    layers = [layer(inputs, outputs, group_format, bias=True) for _ in range(1 + is_gated)]
    made = CpuKernels(build)
    packed = Packer(made, dtype).linear(*layers, is_gated=is_gated)
    count = ctypes.c_int64.in_dll(made._library, "emulated_products")
    x, residual = rows_with_outliers(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    before = count.value
    parts = zip(x.split(15), residual.split(15), strict=True)
    narrow = [made.linear(packed, *part) for part in parts]
    assert count.value == before
    found = made.linear(packed, x, residual)
    assert count.value > before
    assert torch.equal(found, torch.cat(narrow))
    test_weight_groups.check(found, exact(x, layers, is_gated=is_gated) + residual.double())


@pytest.mark.slow
@each_format
def test_groups_on_tiles_pass_the_tests_of_other_builds(build, group_format):
    for check in (
        test_weight_groups.test_nan_does_not_affect_other_rows,
        test_weight_groups.test_a_gate_multiplies_the_up_projection_of_normed_rows,
    ):
        check(build, group_format)


@pytest.mark.slow
def test_bf16_on_tiles_passes_the_tests_of_other_builds(build):
    for check in (
        test_packed_linear.test_layers_over_one_input_are_one_product,
        test_packed_linear.test_bits_of_a_row_do_not_depend_on_its_batch,
        test_packed_linear.test_nan_does_not_affect_other_rows,
        test_kernels.test_attention_equals_plain_torch,
    ):
        check(build, torch.bfloat16)
    check = test_kernels.test_attention_bits_do_not_depend_on_batch_or_chunks
    check(build, torch.bfloat16, head_dim=64, block_size=16)
