"""Tensor operations of memory layers, and the value tables that they read.

``memory_ops.operations`` has the public functions. This file imports nothing, because the HTTP
process imports ``memory_ops.tables.table_statistics`` and must not load torch.
"""
