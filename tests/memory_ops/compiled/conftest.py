"""Leaves these tests to the process that test_triton.py starts for them."""

import os

# they put a driver without a GPU in place of triton's, for good
collect_ignore_glob = [] if os.environ.get("MEMPLUS_COMPILE_TESTS") == "1" else ["*"]
