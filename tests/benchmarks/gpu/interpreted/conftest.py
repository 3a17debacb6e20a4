"""Skips these tests unless triton interprets kernels; makes its interpreter strict."""

import os

import pytest

# triton chooses the mode of a kernel at its definition, so a process has one mode
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    # not at the top: every test run imports this file, and triton may be absent
    from tests.kernel_tools.strict_interpreter import make_strict

    make_strict(monkeypatch)
