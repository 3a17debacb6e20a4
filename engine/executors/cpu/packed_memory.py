"""A packed memory layer whose rows the native kernels read or fetch themselves."""

import ctypes
from typing import NamedTuple

from engine.executors.cpu.packed_linear import PackedLinear, native_fields
from memory_ops.backends import has_native_lookup
from memory_ops.checks import table_shape
from memory_ops.native.tables import NativeTable, table_arguments
from memory_ops.tables.value_table import RowSource


class MemoryProducts(NamedTuple):
    """The packed products of a memory layer; not every memory has a gate."""

    query: PackedLinear
    subkeys: PackedLinear
    gate: PackedLinear | None
    values: PackedLinear


class _Fields(ctypes.Structure):
    """``memplus::MemoryLayer`` of memory_layer.h."""

    _fields_ = (
        *native_fields(ctypes.c_void_p, *MemoryProducts._fields),
        ("table", NativeTable),
        ("fetcher", ctypes.c_void_p),
        ("top_k", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class PackedMemory:
    """The native form of a memory layer, described at ``address`` to the kernels.

    ``num_bytes`` counts the weights without the table, whose rows come from ``source``.
    """

    def __init__(
        self,
        source: RowSource,
        num_heads: int,
        top_k: int,
        products: MemoryProducts,
        scale: float = 1.0,
    ) -> None:
        """Keep references to all arguments; copy nothing. ``scale`` multiplies the rows' sums."""
        values = products.values
        num_subkeys = products.subkeys.num_outputs // (2 * num_heads)
        num_rows, value_dim = table_shape(source.rows)
        assert value_dim == values.num_inputs
        # a fetcher checks row ids, the kernels do not
        assert source.fetcher_address is not None or num_rows == num_subkeys**2
        assert has_native_lookup(source.rows, num_subkeys, top_k)
        assert products.gate is None or products.gate.num_outputs == values.num_inputs
        self.num_heads, self.top_k = num_heads, top_k
        self.source = source
        self._products = products  # keeps the memory that the kernels read alive
        addresses = [None if product is None else product.address for product in products]
        table = NativeTable(*table_arguments(source.rows))
        self._fields = _Fields(*addresses, table, source.fetcher_address, top_k, scale)
        self.address = ctypes.addressof(self._fields)
        self.num_bytes = sum(product.num_bytes for product in products if product is not None)
