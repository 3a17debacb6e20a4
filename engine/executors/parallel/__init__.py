"""The CPU executor: packed weights and native kernels."""
