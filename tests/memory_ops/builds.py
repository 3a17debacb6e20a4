"""The builds of the native library that this machine can run, as a parameter of tests."""

import pytest

from memory_ops.native.library import MEMORY_LIBRARY

each_build = pytest.mark.parametrize("build", MEMORY_LIBRARY.runnable_builds)
