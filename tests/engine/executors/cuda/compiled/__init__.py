"""Compiles the Triton kernels for GPUs this machine lacks; test_kernels.py starts these tests."""
