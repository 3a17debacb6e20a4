"""Operands of a product with a weight, of the norm before it, and of gate and residual after it.

Shape suffixes: M rows of x, K width of x, N rows of the weight, O output columns: N, or N / 2 if
the product is gated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.executors.cuda.kernels.rms_norm import Norm

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LinearOperands:
    """Operands of ``linear``.

    Attributes:
        x_MK: fp32, fp16 or bf16, ``[M, K]`` with contiguous rows and any row stride.
        weight_NK: ``[N, K]`` in the dtype of x, contiguous rows. Gated: gate rows, then up rows.
        bias_N: ``[N]`` in the dtype of x.
        norm: (weight ``[K]``, eps) of the RMSNorm of x.
        residual_MO: ``[M, O]`` in the dtype of x, added to the result.
        is_gated: whether to gate.
        out_MO: ``[M, O]`` in the dtype of x, receives the result. It may be the residual, but must
            not overlap x. Without bias, residual and gate it may be fp32.
    """

    x_MK: Tensor
    weight_NK: Tensor
    bias_N: Tensor | None = None
    norm: Norm | None = None
    residual_MO: Tensor | None = None
    is_gated: bool = False
    out_MO: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        """O."""
        return len(self.weight_NK) // 2 if self.is_gated else len(self.weight_NK)

    def check(self) -> None:
        """Raise ValueError if a shape, a dtype or a layout does not match."""
        x_MK, weight_NK = self.x_MK, self.weight_NK
        if x_MK.dim() != 2 or x_MK.dtype not in _DTYPES or x_MK.stride(1) != 1:
            expected = "[M, K] of fp32, fp16 or bf16, rows contiguous"
            raise ValueError(f"x: expected {expected}, got {_described(x_MK)}")
        num_rows, width = x_MK.shape
        is_like_x = weight_NK.shape[1:] == (width,) and weight_NK.dtype == x_MK.dtype
        if not is_like_x or weight_NK.stride(1) != 1:
            expected = f"{x_MK.dtype} [N, {width}], rows contiguous"
            raise ValueError(f"weight: expected {expected}, got {_described(weight_NK)}")
        if self.is_gated and len(weight_NK) % 2:
            raise ValueError(f"weight: {len(weight_NK)} rows, a gated product needs an even number")
        vectors = {
            "bias": (self.bias_N, len(weight_NK)),
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

    def _check_dtypes(self) -> None:
        dtype, is_plain = self.x_MK.dtype, not self.is_gated
        for name, added in {"bias": self.bias_N, "residual": self.residual_MO}.items():
            is_plain &= added is None
            if added is not None and added.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype}, the dtype of x, got {added.dtype}")
        allowed = (dtype, torch.float32) if is_plain else (dtype,)
        if self.out_MO is not None and self.out_MO.dtype not in allowed:
            raise ValueError(f"out: expected one of {allowed}, got {self.out_MO.dtype}")


def _described(matrix: Tensor) -> str:
    return f"{matrix.dtype} {tuple(matrix.shape)} with strides {matrix.stride()}"
