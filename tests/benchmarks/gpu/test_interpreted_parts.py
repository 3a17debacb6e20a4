"""Parts of the check in Triton's interpreter, in a process of their own."""

from pathlib import Path

import pytest

from tests.kernel_tools.processes import run_tests


@pytest.mark.slow
def test_parts_in_the_interpreter(tmp_path):
    folder = Path(__file__).parent / "interpreted"
    status, output = run_tests([folder], tmp_path, TRITON_INTERPRET="1")
    assert status == 0, output
