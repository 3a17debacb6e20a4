"""How kernels are launched: tile sizes, warps and compiler options, as values that tests compile.

None of these choices is timed on a GPU. They follow from what the compiler makes of them: row loads
of 128 bits, many in flight, and no spilled registers. That is the compiler of triton 3.7; the one
of triton 3.4 spills where int4 is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# NVIDIA's, and what the interpreter is given; AMD's data-centre GPUs have 64 lanes
_LANES = 32


@dataclass(frozen=True)
class RowLaunch:
    """A kernel that reads table rows, with the lanes of all its warps along a row.

    Attributes:
        rows: rows that a program reads at once, as many of them in flight together as the compiler
            finds registers for.
        lane_values: neighbouring values of a row that one lane reads at once, 128 bits of them.
        num_warps: warps of a program. One never waits for another.
    """

    rows: int
    lane_values: int
    num_warps: int = 1

    def block(self, device: torch.device) -> int:
        """Neighbouring values of a row that a program reads at once."""
        return self.lane_values * self.num_warps * lanes(device)

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


def lanes(device: torch.device) -> int:
    """Lanes of a warp on ``device``."""
    if device.type != "cuda":
        return _LANES
    return int(torch.cuda.get_device_properties(device).warp_size)


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """A context in which kernels start on the tensor's device: triton takes the current one."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def row_step(matrix: Tensor) -> int:
    """Elements from row to row: a compile-time constant of kernels, so one that nothing varies.

    The stride of a single row leads nowhere, and may be any number.
    """
    return matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]
