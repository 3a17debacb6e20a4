"""Packed decoder layers in the form that the native library runs."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from engine.executors.cpu.packed_head_norms import PackedHeadNorms
from engine.executors.cpu.packed_linear import PackedLinear
from engine.executors.cpu.packed_memory import PackedMemory


class PackedLayer(NamedTuple):
    """Products of a decoder layer: attention, then a dense feed-forward, a memory, both or neither.

    ``head_norms`` are the norms of its queries and keys, if it has them.
    """

    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear | None = None
    down: PackedLinear | None = None
    memory: PackedMemory | None = None
    head_norms: PackedHeadNorms | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(part.num_bytes for part in self if part is not None)


class _Fields(ctypes.Structure):
    """``memplus::DecoderLayer`` of decoder_layers.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in PackedLayer._fields)


class PackedLayers:
    """All layers of a model, with ``num_heads`` query heads each."""

    def __init__(self, layers: Sequence[PackedLayer], num_heads: int) -> None:
        self.num_heads = num_heads
        self._layers = tuple(layers)  # keeps the memory that the kernels read alive
        self._fields = (_Fields * len(layers))(
            *(_Fields(*(None if p is None else p.address for p in layer)) for layer in layers)
        )

    def address(self, layer: int) -> int:
        """Address of the native description of one layer; those of the next layers follow it."""
        return ctypes.addressof(self._fields) + layer * ctypes.sizeof(_Fields)

    def memories(self, run: range) -> list[PackedMemory]:
        """The memories of consecutive layers."""
        found = (self._layers[layer].memory for layer in run)
        return [memory for memory in found if memory is not None]

    def memory_layers(self, run: range) -> list[int]:
        """Those of consecutive layers that have memories."""
        return [layer for layer in run if self._layers[layer].memory is not None]
