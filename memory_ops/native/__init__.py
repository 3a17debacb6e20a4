"""The operations on a CPU: C++ kernels behind a C interface."""
