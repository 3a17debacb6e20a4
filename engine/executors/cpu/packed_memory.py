"""A memory layer whose value rows lie in memory, or are brought there, as it is run natively."""

import ctypes

from engine.executors.cpu.packed_linear import PackedLinear
from memory_ops.backends import has_native_lookup
from memory_ops.checks import table_shape
from memory_ops.native.backend import table_arguments
from memory_ops.tables.value_table import RowSource


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
        ("fetcher", ctypes.c_void_p),
        ("top_k", ctypes.c_int64),
    )


class PackedMemory:
    """Its products, gate included where there is one, and the table whose rows are read.

    Attributes:
        address: of the description that the kernels read.
        source: the rows that are read.
        num_bytes: of the weights, those of the table apart.
        num_heads: H.
        top_k: K.
    """

    def __init__(
        self,
        source: RowSource,
        num_heads: int,
        top_k: int,
        *,
        query: PackedLinear,
        subkeys: PackedLinear,
        gate: PackedLinear | None,
        values: PackedLinear,
    ) -> None:
        """Hold them all, copying none; the rows of ``source`` are such as kernels read."""
        num_subkeys = subkeys.num_outputs // (2 * num_heads)
        num_rows, value_dim = table_shape(source.rows)
        assert value_dim == values.num_inputs
        # kernels do not check the row ids that they choose; a fetcher does
        assert source.fetcher_address is not None or num_rows == num_subkeys**2
        assert has_native_lookup(source.rows, num_subkeys, top_k)
        assert gate is None or gate.num_outputs == values.num_inputs
        self.num_heads, self.top_k = num_heads, top_k
        self.source = source
        self._held = query, subkeys, gate, values
        self._fields = _Fields(
            query.address,
            subkeys.address,
            None if gate is None else gate.address,
            values.address,
            _Table(*table_arguments(source.rows)),
            source.fetcher_address,
            top_k,
        )
        self.address = ctypes.addressof(self._fields)
        products = query, subkeys, gate, values
        self.num_bytes = sum(product.num_bytes for product in products if product is not None)
