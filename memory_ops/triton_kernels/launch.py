"""How kernels are launched: tile sizes, warps and compiler options, as values that tests compile.

They are the fastest of a few that were timed on an H100 with triton 3.6, and spill no registers on
any target with the compiler of triton 3.7: row loads of 128 bits, many in flight. Those of fp16,
fp8's dots and gradients are not timed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLaunch:
    """A kernel that reads table rows, a tile of them at once.

    Lanes read 128 bits each, side by side along the rows first and then from row to row.

    Attributes:
        rows: rows of a tile, as many of them in flight together as the compiler finds registers
            for.
        columns: neighbouring values of each row; of int4, words of eight.
        num_warps: warps of a program.
    """

    rows: int
    columns: int
    num_warps: int = 1

    def options(self) -> dict[str, int | bool]:
        """What triton's compiler is told; its own defaults change between releases."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class TopkLaunch:
    """A kernel that sorts tiles of scores.

    Attributes:
        block: scores of each half in a tile, a power of two.
        num_warps: warps of a program.
    """

    block: int
    num_warps: int

    def options(self) -> dict[str, int | bool]:
        """What triton's compiler is told. Sums decide an order, so nothing may fuse into them."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """A context in which kernels start on the tensor's device: triton takes the current one."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def row_step(matrix: Tensor) -> int:
    """Elements from row to row: a compile-time constant of kernels, so one that nothing varies.

    The stride of a single row leads nowhere, and may be any number.
    """
    return matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]
