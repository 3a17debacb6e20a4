"""The CUDA executor: Triton kernels and CUDA graphs."""
