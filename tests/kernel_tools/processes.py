"""Runs tests in a process of their own, because triton fixes its mode at import."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run_tests(
    paths: Sequence[Path], tmp_path: Path, *options: str, **environment: str
) -> tuple[int, str]:
    """Run the tests of folders or files with one thread; return (exit status, output)."""
    pytest.importorskip("triton")
    plain = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    # an empty cache: the budget of a kernel that was compiled earlier would prove nothing
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *paths],
        cwd=ROOT,
        env=plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return tests.returncode, tests.stdout[-25000:]
