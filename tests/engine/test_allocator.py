"""The allocator takes its settings; what they are worth is measured by ``memplus bench step``."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the C library's on Linux")
def test_the_c_library_takes_both_settings():
    # in a process of its own, since they last as long as it does
    code = "from engine.allocator import keep_freed_memory; assert keep_freed_memory()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
