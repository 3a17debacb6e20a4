"""Compiles the Triton kernels for GPUs this machine lacks; test_triton.py starts these tests."""
