"""Tensor-parallel ranks: shares, collectives, processes."""
