"""A memory layer whose value rows lie in memory, as the native library runs it."""

import ctypes

from engine.ops.native.packed_linear import PackedLinear
from memory_ops.backends import is_fit_for_cpu
from memory_ops.checks import Table, table_shape
from memory_ops.native.backend import table_arguments


class _Table(ctypes.Structure):
    """``memplus::Table`` of memory_ops' row_table.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("scale_offset", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


class _Fields(ctypes.Structure):
    """``memplus::MemoryLayer`` of memory_layer.h."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("subkeys", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("table", _Table),
        ("top_k", ctypes.c_int64),
    )


class PackedMemory:
    """Its products, gate included where there is one, and the table whose rows are read.

    Attributes:
        address: of the description that the kernels read.
        num_bytes: of the weights, those of the table apart.
        num_heads: H.
        top_k: K.
    """

    def __init__(
        self,
        table: Table,
        num_heads: int,
        top_k: int,
        *,
        query: PackedLinear,
        subkeys: PackedLinear,
        gate: PackedLinear | None,
        values: PackedLinear,
    ) -> None:
        """Hold them all, copying none; the table's rows are such as kernels read."""
        num_subkeys = subkeys.num_outputs // (2 * num_heads)
        assert is_fit_for_cpu(table, num_subkeys, top_k)
        # the kernels check no row id: whatever they choose is a row of such a table
        assert table_shape(table) == (num_subkeys**2, values.num_inputs)
        assert gate is None or gate.num_outputs == values.num_inputs
        self.num_heads, self.top_k = num_heads, top_k
        self._held = table, query, subkeys, gate, values
        self._fields = _Fields(
            query.address,
            subkeys.address,
            None if gate is None else gate.address,
            values.address,
            _Table(*table_arguments(table)),
            top_k,
        )
        self.address = ctypes.addressof(self._fields)
        products = query, subkeys, gate, values
        self.num_bytes = sum(product.num_bytes for product in products if product is not None)
