"""Tiles of products with weights that are read once, and their launch table.

Shape suffixes: M rows of x, K width of x, N rows of the weight.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

# rows of x per program, and the most 16-bit values of each row per step: registers limit them
BLOCKS = {16: 256, 32: 128, 64: 64}
# the most weight rows per program if they are in groups
MOST_GROUPED_N = 64
MOST_BLOCK_M = max(BLOCKS)
# most bytes of tiles in flight per program: an AMD compute unit has no more shared memory
_MOST_BYTES = 65536


@dataclass(frozen=True)
class ProductLaunch:
    """Launch configuration of a kernel that multiplies few rows by tiles of a weight.

    Attributes:
        block_n: output columns per program; a gated product reads twice as many weight rows.
        block_k: 16-bit values of each weight row per step.
        num_warps: warps per program.
        num_stages: steps whose loads are in flight at once, plus one.
    """

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4

    def options(self) -> dict[str, int | bool]:
        """Options for triton's compiler, explicit because its defaults change between releases."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# by is_gated: (least output columns, launch), most columns first. Few columns take narrow, long
# tiles: many programs, each with all of its loads in flight. Many columns take wide tiles, because
# each program reads x again. No launch has been timed on a GPU.
PRODUCT_LAUNCHES: dict[bool, tuple[tuple[int, ProductLaunch], ...]] = {
    False: (
        (32768, ProductLaunch(block_n=128, block_k=64)),
        (4096, ProductLaunch(block_n=32, block_k=128, num_stages=5)),
        (0, ProductLaunch(block_n=16, block_k=256)),
    ),
    True: (
        (4096, ProductLaunch(block_n=64, block_k=64)),
        (0, ProductLaunch(block_n=16, block_k=128, num_stages=5)),
    ),
}


def block_m_for(num_rows: int) -> int:
    """The smallest block that holds the rows, or the largest block."""
    return next((block_m for block_m in BLOCKS if num_rows <= block_m), MOST_BLOCK_M)


def launch_for(
    x_MK: Tensor, outputs: int, block_m: int, *, is_gated: bool, has_groups: bool = False
) -> ProductLaunch:
    """The launch for rows, a number of output columns, and rows per program."""
    launch = next(one for least, one in PRODUCT_LAUNCHES[is_gated] if outputs >= least)
    width = x_MK.shape[1]
    block_k = min(launch.block_k, BLOCKS[block_m])
    if has_groups:
        # a tile of their weights passes through registers, in fp32
        launch = replace(launch, block_n=min(launch.block_n, MOST_GROUPED_N // (1 + is_gated)))
        # and fewer than 128 columns of 4 bits would be narrow loads
        block_k = max(128 if block_m == 16 else 64, block_k * 2 // x_MK.element_size())
    if width % block_k and width % 128 == 0:
        # no masks
        block_k = 128
    step_bytes = (block_m + launch.block_n * (1 + is_gated)) * block_k * 2
    return replace(
        launch,
        block_k=block_k * 2 // x_MK.element_size(),
        num_stages=min(launch.num_stages, 1 + _MOST_BYTES // step_bytes),
    )


@triton.jit
def product_sums(
    x_rows,
    live_m,
    weight_rows,
    live_n,
    norm_ptr,
    first_k,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums[m, n] = sum over k of x[m, k] * norm[k] * weight[n, k];  squares[m] = sum of x[m, k]^2.

    k runs over STEPS blocks from first_k on. ``x_rows`` and ``weight_rows`` point to column 0 of
    each row. Gated products have a second sum, of the weight rows UP_OFFSET values further on.
    """
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K // 8), dtype=tl.float32)
    columns = first_k + tl.arange(0, BLOCK_K)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    for _ in range(STEPS):
        mask_x, mask_w = live_m[:, None], live_n[:, None]
        if not IS_EVEN:
            mask_x, mask_w = mask_x & (columns < K)[None, :], mask_w & (columns < K)[None, :]
        weights = weight_rows[:, None] + columns[None, :]
        x = tl.load(x_rows[:, None] + columns[None, :], mask=mask_x, other=0.0)
        weight = tl.load(weights, mask=mask_w, other=0.0)
        columns += BLOCK_K
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            # a lane loads eight values of a row, so that it adds them without the other lanes
            squares += tl.sum(tl.reshape(wide * wide, [BLOCK_M, BLOCK_K // 8, 8]), axis=2)
            x = (wide * norm[None, :]).to(x.dtype)
            # too narrow for an asynchronous copy, so it is loaded one step ahead
            norm = tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        sums = tl.dot(x, weight.T, sums, input_precision="ieee")
        if IS_GATED:
            up = tl.load(weights + UP_OFFSET, mask=mask_w, other=0.0)
            ups = tl.dot(x, up.T, ups, input_precision="ieee")
    return sums, ups, tl.sum(squares, axis=1)
