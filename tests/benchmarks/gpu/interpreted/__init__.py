"""Parts of the GPU check on tiny models, with kernels that Triton interprets."""
