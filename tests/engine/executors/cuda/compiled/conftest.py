"""Skips these tests outside the process that test_kernels.py starts for them."""

import os

# these tests replace triton's driver by one without a GPU and never restore it
collect_ignore_glob = [] if os.environ.get("MEMPLUS_COMPILE_TESTS") == "1" else ["*"]
