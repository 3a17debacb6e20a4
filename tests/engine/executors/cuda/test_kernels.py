"""The CUDA executor's Triton kernels: interpreted and compiled, each in a process of its own."""

from pathlib import Path

import pytest

from tests.kernel_tools.processes import run_folder

FOLDER = Path(__file__).parent
INTERPRETED, COMPILED = (
    sorted((FOLDER / name).glob("test_*.py")) for name in ("interpreted", "compiled")
)
# pytest's exit status if all tests of a file are deselected
NO_TESTS = 5


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", INTERPRETED, ids=name)
def test_in_the_strict_interpreter(path, tmp_path):
    status, output = run_folder(path, tmp_path, "-m", "not slow", TRITON_INTERPRET="1")
    assert status == 0, output


@pytest.mark.parametrize("path", COMPILED, ids=name)
def test_compiled(path, tmp_path):
    status, output = run_folder(path, tmp_path, "-m", "not slow", MEMPLUS_COMPILE_TESTS="1")
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("path", INTERPRETED, ids=name)
def test_more_cases_in_the_strict_interpreter(path, tmp_path):
    options = ("-m", "slow or hypothesis", "--hypothesis-profile", "many")
    status, output = run_folder(path, tmp_path, *options, TRITON_INTERPRET="1")
    assert status in (0, NO_TESTS), output


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPILED, ids=name)
def test_more_kernels_compiled(path, tmp_path):
    status, output = run_folder(path, tmp_path, "-m", "slow", MEMPLUS_COMPILE_TESTS="1")
    assert status == 0, output
