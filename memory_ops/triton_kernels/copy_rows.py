"""Copies chosen rows between matrices as a Triton kernel: one program per row and block.

Shape suffixes: L copied rows, V value width, R rows of a table, P rows of its copy on the device.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import RowLaunch, on_device_of

# bytes of a program: 128 bits a lane, twice on NVIDIA GPUs, since the bus is slow to answer
_PROGRAM_BYTES = 1024


def copy_rows(source_RV: Tensor, from_L: Tensor, target_PV: Tensor, to_L: Tensor) -> None:
    """Copy rows: ``target[to[l]] = source[from[l]]``.

    One of the matrices may be in page-locked host memory: the GPU reads or writes it over the bus,
    and the call does not wait. Row ids are not checked. Not timed on a GPU.

    Args:
        source_RV: contiguous rows.
        from_L: rows of the source, int64, contiguous.
        target_PV: contiguous rows of the same width and dtype.
        to_L: rows of the target, int64, contiguous; none repeats.
    """
    assert source_RV.dtype is target_PV.dtype and source_RV.shape[1] == target_PV.shape[1]
    width = source_RV.shape[1]
    if not len(from_L) or not width:
        return
    launch = RowLaunch(rows=1, columns=_PROGRAM_BYTES // source_RV.itemsize)
    with on_device_of(from_L):
        _copy_rows[(len(from_L), triton.cdiv(width, launch.columns))](
            source_RV,
            from_L,
            target_PV,
            to_L,
            VALUE_DIM=width,
            BLOCK=launch.columns,
            **launch.options(),
        )


@triton.jit
def _copy_rows(
    source_ptr, from_ptr, target_ptr, to_ptr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < VALUE_DIM
    source = tl.load(from_ptr + place) * VALUE_DIM + columns
    target = tl.load(to_ptr + place) * VALUE_DIM + columns
    tl.store(target_ptr + target, tl.load(source_ptr + source, mask=in_row, other=0), mask=in_row)
