"""Launch configurations of the kernels: tile sizes, warps and compiler options.

They are the fastest of a few candidates timed on an H100 with triton 3.6. Compiled with triton 3.7
they spill no registers on any target. Rows are loaded 128 bits at a time, with many loads in
flight. Configurations for fp16, int4_row, fp8 dots and gradients have not been timed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLaunch:
    """Launch configuration of a kernel that reads tiles of table rows.

    Each lane reads 128 bits. Lanes are adjacent along a row first, then across rows.

    Attributes:
        rows: rows per tile; registers limit how many are in flight at once.
        columns: contiguous values of each row; for both int4 kinds, words of eight values.
        num_warps: warps per program.
    """

    rows: int
    columns: int
    num_warps: int = 1

    def options(self) -> dict[str, int | bool]:
        """Options for triton's compiler, explicit because its defaults change between releases."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class TopkLaunch:
    """Launch configuration of a kernel that sorts tiles of scores.

    Attributes:
        block: scores of each half per tile, a power of two.
        num_warps: warps per program.
    """

    block: int
    num_warps: int

    def options(self) -> dict[str, int | bool]:
        """Options for triton's compiler. No fusion, because rounding of sums decides the order."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """A context that makes the tensor's device current, because triton launches there."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def constant_row_stride(matrix: Tensor) -> int:
    """The row stride in elements, a compile-time constant of kernels.

    A single row's stride can be any number, so it is replaced by the width: otherwise each number
    would compile the kernel again.
    """
    return matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]
