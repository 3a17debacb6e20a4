"""Runs the Triton kernels in a strict interpreter; test_triton.py starts these tests."""
