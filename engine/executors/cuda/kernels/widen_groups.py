"""A dense copy of weights in groups, as a Triton kernel.

Shape suffixes: N rows of the weight, K inputs.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.executors.cuda.kernels.grouped_tiles import group_row, weight_arrays
from engine.executors.cuda.kernels.linear_operands import check_groups
from engine.model.grouped_weights import WeightGroups, dense_weights, num_groups
from memory_ops.triton_kernels.launch import on_device_of

# groups per program; not timed on a GPU
_BLOCK, _NUM_WARPS = 64, 4


def widen_groups(groups: WeightGroups, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weights ``[N, K]`` in ``dtype``, on the device of the groups.

    Raises:
        ValueError: an array of the groups has another shape, dtype or layout.
    """
    check_groups("groups", groups, (groups.num_outputs, inputs))
    device = groups.values.device
    out_NK = torch.empty((groups.num_outputs, inputs), dtype=dtype, device=device)
    arrays, bits = weight_arrays(groups)
    if out_NK.numel():
        with on_device_of(out_NK):
            _widen[(len(out_NK), triton.cdiv(num_groups(inputs), _BLOCK))](
                *arrays,
                out_NK,
                K=inputs,
                GROUPS=num_groups(inputs),
                BITS=bits,
                BLOCK=min(_BLOCK, triton.next_power_of_2(num_groups(inputs))),
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return out_NK


@triton.jit
def _widen(
    values_ptr,
    scales_ptr,
    minimums_ptr,
    out_ptr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, k] = integers[n, k] * scales[n, k // 32] + minimums[n, k // 32]."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns, weights = group_row(values_ptr, scales_ptr, minimums_ptr, row, groups, GROUPS, BITS)
    out_ptrs = out_ptr + row * K + columns
    tl.store(out_ptrs, weights.to(out_ptr.dtype.element_ty), mask=columns < K)


def widen_groups_reference(groups: WeightGroups, inputs: int, dtype: torch.dtype) -> Tensor:
    """``widen_groups`` in plain torch."""
    return dense_weights(groups, inputs, dtype)
