"""The CUDA executor's Triton kernels: interpreted and compiled, each in a process of its own."""

from pathlib import Path

import pytest

from tests.kernel_tools.processes import run_folder

FOLDER = Path(__file__).parent


def test_in_the_strict_interpreter(tmp_path):
    options = ("-m", "not slow")
    status, output = run_folder(FOLDER / "interpreted", tmp_path, *options, TRITON_INTERPRET="1")
    assert status == 0, output


def test_compiled(tmp_path):
    options = ("-m", "not slow")
    status, output = run_folder(FOLDER / "compiled", tmp_path, *options, MEMPLUS_COMPILE_TESTS="1")
    assert status == 0, output


@pytest.mark.slow
def test_more_cases_in_the_strict_interpreter(tmp_path):
    options = ("-m", "slow or hypothesis", "--hypothesis-profile", "many")
    status, output = run_folder(FOLDER / "interpreted", tmp_path, *options, TRITON_INTERPRET="1")
    assert status == 0, output


@pytest.mark.slow
def test_the_largest_kernels_compiled(tmp_path):
    status, output = run_folder(
        FOLDER / "compiled", tmp_path, "-m", "slow", MEMPLUS_COMPILE_TESTS="1"
    )
    assert status == 0, output
