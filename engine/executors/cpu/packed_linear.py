"""Weights of linear layers in the layout that the product kernel reads."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memory_ops.anonymous import anonymous_zeros


class _Fields(ctypes.Structure):
    """``memplus::PackedLinear`` of packed_linear.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm_weights", ctypes.c_void_p),
        ("norm_rows", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("norm_eps", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("has_wide_outputs", ctypes.c_int32),
    )


@dataclass(frozen=True)
class WeightRows:
    """Rows of weights ``[outputs, inputs]``, and where they go.

    Attributes:
        weight_OI: their values, a row's one after another.
        bias_O: added to their outputs, where given.
        block: the product that they belong to.
        first: the output of it that the first of them gives.
        part: of a gated layer 0 for the gate, 1 for what it multiplies.
    """

    weight_OI: Tensor
    bias_O: Tensor | None = None
    block: int = 0
    first: int = 0
    part: int = 0


class PackedLinear:
    """``blocks`` products side by side, each of its own ``inputs`` of a row to ``outputs`` values.

    Attributes:
        address: of the description that the kernels read.
        num_bytes: of the weights.
        num_inputs: values of a row of each block.
        num_outputs: values of a row of the output, all blocks together.
        out_dtype: their dtype.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        rows: Sequence[WeightRows],
        outputs: int,
        *,
        norm: tuple[Tensor, float] | None = None,
        is_gated: bool = False,
        has_wide_outputs: bool = False,
    ) -> None:
        """Copy the rows; all are fp32, or all bf16. ``norm`` is a weight and its epsilon."""
        dtype = rows[0].weight_OI.dtype
        fields = _Fields(
            blocks=1 + max(part.block for part in rows),
            inputs=rows[0].weight_OI.shape[1],
            outputs=outputs,
            is_bf16=dtype == torch.bfloat16,
            is_gated=is_gated,
            has_wide_outputs=has_wide_outputs,
        )
        self._fields = fields
        self.address = ctypes.addressof(fields)
        self.num_inputs: int = rows[0].weight_OI.shape[1]
        self.num_outputs = int(fields.blocks * outputs)
        self.out_dtype = torch.float32 if has_wide_outputs else dtype
        self.num_bytes: int = library.memplus_panel_bytes(self.address)
        # what the last prefetches ask for need not be there
        self._panels = anonymous_zeros((self.num_bytes,), torch.uint8)
        fields.panels = self._panels.data_ptr()
        if any(part.bias_O is not None for part in rows):
            self._bias = torch.zeros(library.memplus_bias_size(self.address))
            fields.bias = self._bias.data_ptr()
        for part in rows:
            self._add(library, part)
        if norm is not None:
            self._norm_weights = norm[0].contiguous().clone()
            fields.norm_weights = self._norm_weights.data_ptr()
            fields.norm_rows = norm[0].numel() // fields.inputs
            fields.norm_eps = norm[1]

    def _add(self, library: ctypes.CDLL, part: WeightRows) -> None:
        weight_OI = part.weight_OI
        assert weight_OI.stride(1) == 1
        bias_O = None if part.bias_O is None else part.bias_O.float().contiguous()
        library.memplus_pack_rows(
            self.address,
            weight_OI.data_ptr(),
            weight_OI.stride(0) * weight_OI.itemsize,
            None if bias_O is None else bias_O.data_ptr(),
            len(weight_OI),
            part.block,
            part.first,
            part.part,
        )
