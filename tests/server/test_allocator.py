"""The malloc settings are accepted; ``memplus bench step`` measures their effect."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the C library's on Linux")
def test_the_c_library_accepts_both_settings():
    # in a subprocess, since the settings last until the process ends
    code = "from server.allocator import keep_freed_memory; assert keep_freed_memory()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
