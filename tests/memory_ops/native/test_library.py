"""The native library: choice of builds, and the fallback without any build."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from memory_ops import backends
from memory_ops.native.backend import NativeBackend
from memory_ops.native.library import BUILDS, MEMORY_LIBRARY, NativeLibrary
from memory_ops.operations import gather_rows, product_topk


@pytest.fixture
def no_builds(tmp_path, monkeypatch):
    """As installed where there was no compiler."""
    none = NativeLibrary(tmp_path, {}, MEMORY_LIBRARY.consequence)
    monkeypatch.setattr(backends, "MEMORY_LIBRARY", none)
    backends._for_device_type.cache_clear()
    yield
    backends._for_device_type.cache_clear()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_library_was_built_and_its_best_build_is_used():
    builds = MEMORY_LIBRARY.runnable_builds
    assert builds and builds[-1] == "portable"
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx2" in flags:
        assert "avx2" in builds
    if "avx512bw" in flags:
        assert builds == BUILDS[2:]  # this library has no bf16 build
    backend = backends.for_topk(torch.zeros(1, 1, 2, 4), 2)
    assert isinstance(backend, NativeBackend) and MEMORY_LIBRARY.best_build == builds[0]


def test_any_build_that_runs_can_be_forced():
    for build in MEMORY_LIBRARY.runnable_builds:
        rows, _ = NativeBackend(build).product_topk(torch.randn(1, 1, 2, 4), 2)
        assert rows.shape == (1, 1, 2)


def test_without_builds_plain_torch_computes_and_one_warning_is_logged(no_builds, caplog):
    table, rows, weights = torch.randn(9, 5), torch.randint(0, 9, (2, 1, 3)), torch.rand(2, 1, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = gather_rows(table, rows, weights)
            product_topk(torch.randn(2, 1, 2, 4), 3)
    torch.testing.assert_close(out, (table[rows] * weights.unsqueeze(-1)).sum((1, 2)))
    (record,) = caplog.records
    assert "without its native library" in record.message


def test_unsupported_operands_go_to_plain_torch():
    scores = torch.randn(1, 1, 2, 200)
    assert product_topk(scores, 200)[0].shape == (1, 1, 200)
    assert product_topk(scores.double(), 3)[1].dtype == torch.float64
    rows, weights = torch.randint(0, 9, (2, 1, 3)), torch.rand(2, 1, 3)
    upright = torch.randn(5, 9).t()
    torch.testing.assert_close(
        gather_rows(upright, rows, weights), gather_rows(upright.contiguous(), rows, weights)
    )
