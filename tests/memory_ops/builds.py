"""The builds of the native library that this machine can run, as a parameter of tests."""

import pytest

from memory_ops.native.library import runnable_builds

each_build = pytest.mark.parametrize("build", runnable_builds())
