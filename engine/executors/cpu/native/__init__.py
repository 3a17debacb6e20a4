"""C++ kernels of the CPU executor."""
