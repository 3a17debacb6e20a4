"""The memory layer's operations, as functions of tensors, and the tables that they read.

``memory_ops.operations`` has the public functions. This file imports nothing: the HTTP process
imports ``memory_ops.tables.table_statistics`` and must not load torch.
"""
