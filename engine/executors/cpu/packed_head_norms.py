"""Norms of the heads of queries and keys, in the form that the native attention reads."""

import ctypes

from engine.model.norm import RmsNorm


class _Fields(ctypes.Structure):
    """``memplus::HeadNorms`` of attention_call.h."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


class PackedHeadNorms:
    """The norms of one layer, described at ``address``; they share the weights of the arguments.

    Both have weights ``[E]`` in the dtype of the layer's activations, and the same eps.
    """

    def __init__(self, query: RmsNorm, key: RmsNorm) -> None:
        assert query.eps == key.eps and query.weight.dtype is key.weight.dtype
        assert query.weight.is_contiguous() and key.weight.is_contiguous()
        self._weights = query.weight, key.weight  # keeps the memory that the kernels read alive
        self._fields = _Fields(*(weight.data_ptr() for weight in self._weights), query.eps)
        self.address = ctypes.addressof(self._fields)
        self.num_bytes = sum(weight.nbytes for weight in self._weights)
