"""Decoder layers whose products are packed, as the native library runs them one after another."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from engine.executors.cpu.packed_linear import PackedLinear
from engine.executors.cpu.packed_memory import PackedMemory


class PackedLayer(NamedTuple):
    """The products of one decoder layer; of one whose feed-forward is run elsewhere the first two.

    Its feed-forward is dense, or a memory.
    """

    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear | None = None
    down: PackedLinear | None = None
    memory: PackedMemory | None = None

    @property
    def num_bytes(self) -> int:
        """Of their weights."""
        return sum(part.num_bytes for part in self if part is not None)


class _Fields(ctypes.Structure):
    """``memplus::DecoderLayer`` of decoder_layers.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in PackedLayer._fields)


class PackedLayers:
    """All layers of a model.

    Attributes:
        num_heads: query heads of their attention.
    """

    def __init__(self, layers: Sequence[PackedLayer], num_heads: int) -> None:
        self.num_heads = num_heads
        self._layers = tuple(layers)  # the kernels read what they hold
        self._fields = (_Fields * len(layers))(
            *(_Fields(*(None if p is None else p.address for p in layer)) for layer in layers)
        )

    def address(self, layer: int) -> int:
        """Of the description of one layer, behind which those of the following lie."""
        return ctypes.addressof(self._fields) + layer * ctypes.sizeof(_Fields)

    def memories(self, run: range) -> list[PackedMemory]:
        """Of some consecutive layers."""
        found = (self._layers[layer].memory for layer in run)
        return [memory for memory in found if memory is not None]
