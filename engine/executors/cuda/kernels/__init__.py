"""Triton kernels of the CUDA executor, each with a twin in plain torch."""
