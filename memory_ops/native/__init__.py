"""CPU backend of the operations: C++ kernels behind a C interface."""
