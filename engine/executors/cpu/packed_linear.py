"""Weights of linear layers in the layout that the product kernels read."""

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model.grouped_weights import WeightGroups
from memory_ops.anonymous import anonymous_zeros


def native_fields(kind: type, *names: str) -> Iterator[tuple[str, type]]:
    """Fields of one C type for ``ctypes.Structure._fields_``."""
    return ((name, kind) for name in names)


class _Fields(ctypes.Structure):
    """``memplus::PackedLinear`` of packed_linear.h."""

    _fields_ = (
        *native_fields(ctypes.c_void_p, "panels", "bias", "norm_weights"),
        *native_fields(ctypes.c_int64, "norm_rows", "blocks", "inputs", "outputs"),
        *native_fields(ctypes.c_float, "norm_eps"),
        *native_fields(ctypes.c_int32, "is_bf16", "weight_bits", "has_minimums"),
        *native_fields(ctypes.c_int32, "is_gated", "has_wide_outputs"),
    )


class WeightRows(NamedTuple):
    """Rows of weights ``[outputs, inputs]``, and their place in a packed product.

    Attributes:
        weights: values ``[outputs, inputs]``, each row contiguous; or groups.
        bias_O: bias of their outputs, if any.
        block: index of the block that they belong to.
        first: the block's output that the first row computes.
        part: 0 for the gate of a gated layer, 1 for the factor that it multiplies; else 0.
    """

    weights: Tensor | WeightGroups
    bias_O: Tensor | None = None
    block: int = 0
    first: int = 0
    part: int = 0


class PackedLinear:
    """A product of one or more blocks; each maps its ``inputs`` values of a row to ``outputs``.

    Attributes:
        address: address of the native description.
        num_bytes: bytes of the weights.
        num_inputs: input values per row of each block.
        num_outputs: output values per row of all blocks, in ``out_dtype``.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        rows: Sequence[WeightRows],
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
        *,
        norm: tuple[Tensor, float] | None = None,
        is_gated: bool = False,
        has_wide_outputs: bool = False,
    ) -> None:
        """Copy the rows: all are values of ``dtype``, or all are groups of the same format.

        Inputs and outputs have ``dtype``, fp32 or bf16. ``norm`` is a weight and its epsilon.
        """
        first = rows[0].weights
        self.num_inputs = inputs
        num_blocks = 1 + max(part.block for part in rows)
        fields = _Fields(blocks=num_blocks, inputs=self.num_inputs, outputs=outputs)
        fields.is_bf16, fields.is_gated = dtype == torch.bfloat16, is_gated
        if isinstance(first, WeightGroups):
            assert first.bits == 4 or first.minimums_OG is None  # no kernel has both
            fields.weight_bits, fields.has_minimums = first.format
        fields.has_wide_outputs = has_wide_outputs
        self._fields, self.address = fields, ctypes.addressof(fields)
        self.num_outputs = num_blocks * outputs
        self.out_dtype = torch.float32 if has_wide_outputs else dtype
        self.num_bytes: int = library.memplus_panel_bytes(self.address)
        # the kernels' last prefetches may point behind this memory
        self._panels = anonymous_zeros((self.num_bytes,), torch.uint8)
        fields.panels = self._panels.data_ptr()
        if any(part.bias_O is not None for part in rows):
            self._bias = torch.zeros(library.memplus_bias_size(self.address))
            fields.bias = self._bias.data_ptr()
        for part in rows:
            self._pack(library, part)
        if norm is not None:
            self._norm_weights = norm[0].contiguous().clone()
            fields.norm_weights = self._norm_weights.data_ptr()
            fields.norm_rows = norm[0].numel() // fields.inputs
            fields.norm_eps = norm[1]

    def _pack(self, library: ctypes.CDLL, part: WeightRows) -> None:
        if isinstance(part.weights, WeightGroups):
            assert part.weights.format == (self._fields.weight_bits, self._fields.has_minimums)
            weights, *others = (one.contiguous() for one in part.weights.tensors.values())
        else:
            weights, others = part.weights, []
        assert weights.stride(1) == 1
        scales = others[0].data_ptr() if others else None
        minimums = others[1].data_ptr() if len(others) > 1 else None
        bias_O = None if part.bias_O is None else part.bias_O.float().contiguous()
        bias = None if bias_O is None else bias_O.data_ptr()
        address, stride = weights.data_ptr(), weights.stride(0) * weights.itemsize
        place = len(weights), part.block, part.first, part.part
        library.memplus_pack_rows(self.address, address, stride, scales, minimums, bias, *place)
