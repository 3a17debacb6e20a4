"""Operands of a product with a weight, of the norm before it, and of gate and residual after it.

Shape suffixes: M rows of x, K width of x, N rows of the weight, O output columns: N, or N / 2 if
the product is gated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.executors.cuda.kernels.rms_norm import Norm
from engine.model.grouped_weights import WeightGroups

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LinearOperands:
    """Operands of ``linear``.

    Attributes:
        x_MK: fp32, fp16 or bf16, ``[M, K]`` with contiguous rows and any row stride.
        weight_NK: ``[N, K]`` in the dtype of x, contiguous rows; or groups, contiguous. Gated: gate
            rows, then up rows.
        bias_N: ``[N]`` in the dtype of x.
        norm: (weight ``[K]``, eps) of the RMSNorm of x.
        residual_MO: ``[M, O]`` in the dtype of x, added to the result.
        is_gated: whether to gate.
        out_MO: ``[M, O]`` in the dtype of x, receives the result. It may be the residual, but must
            not overlap x. Without bias, residual and gate it may be fp32.
    """

    x_MK: Tensor
    weight_NK: Tensor | WeightGroups
    bias_N: Tensor | None = None
    norm: Norm | None = None
    residual_MO: Tensor | None = None
    is_gated: bool = False
    out_MO: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.num_weight_rows // (1 + self.is_gated)

    @property
    def num_weight_rows(self) -> int:
        """N."""
        weight_NK = self.weight_NK
        return len(weight_NK) if isinstance(weight_NK, Tensor) else weight_NK.num_outputs

    def check(self) -> None:
        """Raise ValueError if a shape, a dtype or a layout does not match."""
        x_MK, num_weight_rows = self.x_MK, self.num_weight_rows
        if x_MK.dim() != 2 or x_MK.dtype not in _DTYPES or x_MK.stride(1) != 1:
            expected = "[M, K] of fp32, fp16 or bf16, rows contiguous"
            raise ValueError(f"x: expected {expected}, got {_described(x_MK)}")
        num_rows, width = x_MK.shape
        self._check_weight()
        if self.is_gated and num_weight_rows % 2:
            raise ValueError(
                f"weight: {num_weight_rows} rows, a gated product needs an even number"
            )
        vectors = {
            "bias": (self.bias_N, num_weight_rows),
            "norm": (self.norm and self.norm[0], width),
        }
        for name, (vector, size) in vectors.items():
            if vector is not None and (vector.shape != (size,) or not vector.is_contiguous()):
                raise ValueError(f"{name}: expected [{size}], got {tuple(vector.shape)}")
        shape = num_rows, self.num_outputs
        for name, matrix in {"residual": self.residual_MO, "out": self.out_MO}.items():
            if matrix is not None and (matrix.shape != shape or matrix.stride(1) != 1):
                expected = f"{list(shape)}, rows contiguous"
                raise ValueError(f"{name}: expected {expected}, got {_described(matrix)}")
        self._check_dtypes()

    def _check_weight(self) -> None:
        dtype, width, weight = self.x_MK.dtype, self.x_MK.shape[1], self.weight_NK
        if isinstance(weight, WeightGroups):
            check_groups("weight", weight, (weight.num_outputs, width))
        elif weight.shape[1:] != (width,) or weight.dtype != dtype or weight.stride(1) != 1:
            expected = f"{dtype} [N, {width}], rows contiguous"
            raise ValueError(f"weight: expected {expected}, got {_described(weight)}")

    def _check_dtypes(self) -> None:
        dtype, is_plain = self.x_MK.dtype, not self.is_gated
        for name, added in {"bias": self.bias_N, "residual": self.residual_MO}.items():
            is_plain &= added is None
            if added is not None and added.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype}, the dtype of x, got {added.dtype}")
        allowed = (dtype, torch.float32) if is_plain else (dtype,)
        if self.out_MO is not None and self.out_MO.dtype not in allowed:
            raise ValueError(f"out: expected one of {allowed}, got {self.out_MO.dtype}")


def check_groups(name: str, groups: WeightGroups, shape: Sequence[int]) -> None:
    """Raise ValueError, which begins with ``name``, unless groups are of weights of this shape.

    All dimensions of the shape but the last are those of the arrays.
    """
    *outer, inputs = shape
    for array, ((_, columns), dtype) in groups.format.arrays(1, inputs).items():
        found, size = groups.tensors[array], (*outer, columns)
        if found.shape != size or found.dtype != dtype or not found.is_contiguous():
            expected = f"contiguous {dtype} {list(size)}"
            raise ValueError(f"{name}: expected {expected} as {array}, got {_described(found)}")


def _described(matrix: Tensor) -> str:
    return f"{matrix.dtype} {tuple(matrix.shape)} with strides {matrix.stride()}"
