"""Runs the Triton kernels in a strict interpreter; test_kernels.py starts these tests."""
