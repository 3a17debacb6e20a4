"""Storage formats of KV blocks: values in the model's dtype, or fp8 codes (e4m3) as uint8."""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.table_view import FP8_FACTOR, fp8_values

# of 448.0; positive floats are ordered like their bits
_LARGEST_BITS = tl.constexpr(0x43E00000)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
# fp32 values in [2**14, 2**15) are 2**-9 apart, like e4m3's subnormal values
_SUBNORMAL_SHIFT = tl.constexpr(2.0**14)
_SUBNORMAL_BITS = tl.constexpr(0x46800000)
# difference of the exponent biases, above three bits of fraction
_BIAS = tl.constexpr((127 - 7) << 3)
_NAN = tl.constexpr(0x7F)


def check_kv_dtype(kv_blocks: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless the blocks have this dtype or hold fp8 codes."""
    if kv_blocks.dtype not in (dtype, torch.uint8):
        raise ValueError(f"kv_blocks: expected {dtype} or torch.uint8, not {kv_blocks.dtype}")


def kernel_view(kv_blocks: Tensor) -> Tensor:
    """The blocks as kernels access them: fp8 codes are int8, because kernels extend their sign."""
    return kv_blocks.view(torch.int8) if kv_blocks.dtype == torch.uint8 else kv_blocks


@triton.jit
def kv_values(stored, dtype: tl.constexpr):
    """Stored keys or values in a dtype; those of fp8 are too small by ``kv_factor``.

    Exact, but fp8's NaN decodes as 480.
    """
    if stored.dtype == tl.int8:
        stored = fp8_values(stored).to(dtype)
    return stored


@triton.jit
def kv_factor(kv_ptr):
    """The factor that ``kv_values`` leaves to sums of its results."""
    factor: tl.constexpr = FP8_FACTOR if kv_ptr.dtype.element_ty == tl.int8 else 1.0
    return factor


@triton.jit
def fp8_codes(values):
    """fp8 codes (int8) of fp32 values: round to nearest even, saturate at 448.

    Integer arithmetic, because sm_80 has no instruction for e4m3.
    """
    bits = values.to(tl.int32, bitcast=True)
    size_bits = tl.minimum(bits & 0x7FFFFFFF, _LARGEST_BITS)
    sizes = size_bits.to(tl.float32, bitcast=True)
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - _BIAS
    subnormal = (sizes + _SUBNORMAL_SHIFT).to(tl.int32, bitcast=True) - _SUBNORMAL_BITS
    codes = tl.where(sizes < _SMALLEST_NORMAL, subnormal, normal)
    codes = tl.where(values == values, codes, _NAN)
    return (codes | ((bits >> 24) & 0x80)).to(tl.int8)


def kv_values_reference(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored keys or values in a dtype."""
    return (stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored).to(dtype)


def fp8_codes_reference(values: Tensor) -> Tensor:
    """fp8 codes (uint8) of values: round to nearest even, saturate at 448."""
    return values.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
