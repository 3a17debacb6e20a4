"""The CUDA executor's Triton kernels: interpreted and compiled, in processes of their own."""

from pathlib import Path

import pytest

from tests.kernel_tools.processes import run_tests

FOLDER = Path(__file__).parent
INTERPRETED, COMPILED = (
    sorted((FOLDER / name).glob("test_*.py")) for name in ("interpreted", "compiled")
)
# processes that run side by side, and each import torch and triton
GROUPS = 4
QUICK = [INTERPRETED[number::GROUPS] for number in range(GROUPS)]


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("paths", QUICK, ids=lambda paths: paths[0].stem)
def test_in_the_strict_interpreter(paths, tmp_path):
    status, output = run_tests(paths, tmp_path, "-m", "not slow", TRITON_INTERPRET="1")
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("path", INTERPRETED, ids=name)
def test_more_cases_in_the_strict_interpreter(path, tmp_path):
    options = ("-m", "slow or hypothesis", "--hypothesis-profile", "many")
    status, output = run_tests([path], tmp_path, *options, TRITON_INTERPRET="1")
    # a file may have no more cases
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), output


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPILED, ids=name)
def test_compiled(path, tmp_path):
    status, output = run_tests([path], tmp_path, MEMPLUS_COMPILE_TESTS="1")
    assert status == 0, output
