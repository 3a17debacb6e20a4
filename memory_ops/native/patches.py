"""Describes row patches to the native kernels."""

import ctypes
import itertools
from collections.abc import Sequence

import numpy as np

from memory_ops.native.tables import NativeTable, table_arguments
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import TokenPatches

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
# ``memplus::PatchUse`` of row_patches.h
_USE = np.dtype([("patch", np.uint64), ("scale", np.float32)], align=True)


class _Patch(ctypes.Structure):
    """``memplus::Patch`` of row_patches.h."""

    _fields_ = (
        ("deltas", NativeTable),
        ("rows", _POINTER),
        ("index", _POINTER),
        ("index_bits", _INT64),
        ("factor", _INT64),
        ("counts", _POINTER),
    )


class _Patches(ctypes.Structure):
    """``memplus::TokenPatches`` of row_patches.h."""

    _fields_ = (("sets", _POINTER), ("starts", _POINTER), ("uses", _POINTER))


class NativePatches:
    """The patches of lookups' tokens, an array at ``address`` as long as this object lives."""

    def __init__(self, lookups: Sequence[TokenPatches]) -> None:
        """Describe the patches of each lookup; copy no rows."""
        self._kept: list[object] = [lookups]  # the memory that the kernels read
        self._fields = (_Patches * len(lookups))(*map(self._fields_of, lookups))
        self.address = ctypes.addressof(self._fields)

    def _fields_of(self, patches: TokenPatches) -> _Patches:
        used = {id(use.patch): use.patch for uses in patches.sets for use in uses}
        native = {number: _patch(patch) for number, patch in used.items()}
        uses = [
            (ctypes.addressof(native[id(use.patch)]), use.scale)
            for use in itertools.chain.from_iterable(patches.sets)
        ]
        starts = np.cumsum([0, *map(len, patches.sets)], dtype=np.int64)
        uses_U, set_T = np.array(uses, dtype=_USE), patches.set_T.contiguous()
        self._kept += [native, starts, uses_U, set_T]
        return _Patches(set_T.data_ptr(), starts.ctypes.data, uses_U.ctypes.data)


def _patch(patch: PatchedRows) -> _Patch:
    deltas = NativeTable(*table_arguments(patch.deltas_PV))
    bits = len(patch.index_I).bit_length() - 1
    rows, index, counts = (t.data_ptr() for t in (patch.rows_P, patch.index_I, patch.counts))
    return _Patch(deltas, rows, index, bits, patch.factor, counts)
