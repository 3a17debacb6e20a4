"""A memory layer whose value rows lie in memory, or are brought there, as it is run natively."""

import ctypes

from engine.executors.cpu.packed_linear import PackedLinear
from memory_ops.backends import is_fit_for_cpu
from memory_ops.checks import Table, table_shape
from memory_ops.native.backend import table_arguments
from memory_ops.native.row_fetcher import ReadFailure
from memory_ops.tables.value_table import FetchedTable, TableReadError


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
        num_bytes: of the weights, those of the table apart.
        num_heads: H.
        top_k: K.
    """

    def __init__(
        self,
        rows: Table,
        fetched: FetchedTable | None,
        layer: int,
        num_heads: int,
        top_k: int,
        *,
        query: PackedLinear,
        subkeys: PackedLinear,
        gate: PackedLinear | None,
        values: PackedLinear,
    ) -> None:
        """Hold them all, copying none; ``rows`` are such as kernels read.

        They are the table's, or the slots of one whose rows are ``fetched`` for this layer.
        """
        num_subkeys = subkeys.num_outputs // (2 * num_heads)
        # the kernels check no row id: whatever they choose is a row of such a table
        shape = table_shape(rows) if fetched is None else (fetched.num_rows, fetched.value_dim)
        assert shape == (num_subkeys**2, values.num_inputs)
        self._fetched = fetched
        self._fetcher = fetched.fetcher(layer) if fetched is not None else None
        assert is_fit_for_cpu(rows, num_subkeys, top_k)
        assert gate is None or gate.num_outputs == values.num_inputs
        self.num_heads, self.top_k = num_heads, top_k
        self._held = rows, query, subkeys, gate, values
        self._fields = _Fields(
            query.address,
            subkeys.address,
            None if gate is None else gate.address,
            values.address,
            _Table(*table_arguments(rows)),
            None if self._fetcher is None else ctypes.addressof(self._fetcher),
            top_k,
        )
        self.address = ctypes.addressof(self._fields)
        products = query, subkeys, gate, values
        self.num_bytes = sum(product.num_bytes for product in products if product is not None)

    def check(self) -> None:
        """Raise TableReadError where rows are fetched from what has changed."""
        if self._fetched is not None:
            self._fetched.check_file()

    def error(self, failure: ReadFailure) -> TableReadError:
        """What to raise for rows that could not be fetched."""
        assert self._fetched is not None
        return self._fetched.read_error(failure.row, failure.error)
