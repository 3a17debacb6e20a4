"""Tools that test Triton kernels without a GPU: a strict interpreter, and machine code."""
