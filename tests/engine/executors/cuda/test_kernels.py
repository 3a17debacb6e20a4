"""The CUDA executor's Triton kernels: interpreted and compiled, in processes of their own."""

from pathlib import Path

import pytest

from tests.kernel_tools.processes import run_tests

FOLDER = Path(__file__).parent
INTERPRETED, COMPILED = (
    sorted((FOLDER / name).glob("test_*.py")) for name in ("interpreted", "compiled")
)
# each process imports torch and triton: a few processes side by side, not one a file
GROUPS = 4


def name(path: Path) -> str:
    return path.stem


def test_in_the_strict_interpreter(tmp_path):
    status, output = run_tests(INTERPRETED, tmp_path, "-m", "not slow", TRITON_INTERPRET="1")
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_more_cases_in_the_strict_interpreter(group, tmp_path):
    options = ("-m", "slow or hypothesis", "--hypothesis-profile", "some")
    status, output = run_tests(INTERPRETED[group::GROUPS], tmp_path, *options, TRITON_INTERPRET="1")
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPILED, ids=name)
def test_compiled(path, tmp_path):
    status, output = run_tests([path], tmp_path, MEMPLUS_COMPILE_TESTS="1")
    assert status == 0, output
