"""Launch configurations of the attention kernels: tile sizes, warps and compiler options.

They are not timed on a GPU. Compiled with triton 3.7 they fit in the shared memory of gfx942
(64 KiB) and of consumer cards (99 KiB), except for ``LARGE_PREFILL_LAUNCHES``. They load at least
one tile of keys while they compute with another. They spill no registers, with exceptions that only
tests of results use: of fp32 heads with more than 128 values, prefill on sm_80 and short chunks on
gfx942, and fp32 queries with fp8 blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGE_SHARED_BYTES = 227 * 2**10


@dataclass(frozen=True)
class AttentionLaunch:
    """Launch configuration of an attention kernel.

    Attributes:
        keys: keys per tile; for the kernel that combines splits, the most splits per tile.
        num_warps: warps per program.
        num_stages: tiles in flight, with the one that the program computes with.
        most_heads: upper limit of the query heads per program, for prefill.
    """

    keys: int
    num_warps: int
    num_stages: int
    most_heads: int = 0

    def options(self) -> dict[str, int | bool]:
        """Options for triton's compiler, explicit because its defaults change between releases."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# by bytes per value of the queries, and the largest head size
DECODE_LAUNCHES = {
    (2, 64): AttentionLaunch(keys=64, num_warps=4, num_stages=4),
    (2, 128): AttentionLaunch(keys=64, num_warps=4, num_stages=3),
    (2, 256): AttentionLaunch(keys=32, num_warps=4, num_stages=3),
    (4, 64): AttentionLaunch(keys=32, num_warps=4, num_stages=3),
    (4, 128): AttentionLaunch(keys=16, num_warps=4, num_stages=3),
    (4, 256): AttentionLaunch(keys=16, num_warps=4, num_stages=2),
}
# for the short chunks of mixed steps, and their decodes
CHUNK_LAUNCHES = {
    (2, 64): AttentionLaunch(keys=64, num_warps=4, num_stages=3),
    (2, 128): AttentionLaunch(keys=32, num_warps=4, num_stages=3),
    (2, 256): AttentionLaunch(keys=16, num_warps=8, num_stages=2),
    (4, 64): AttentionLaunch(keys=32, num_warps=8, num_stages=3),
    (4, 128): AttentionLaunch(keys=16, num_warps=16, num_stages=2),
    (4, 256): AttentionLaunch(keys=16, num_warps=16, num_stages=1),
}
PREFILL_LAUNCHES = {
    (2, 64): AttentionLaunch(keys=64, num_warps=8, num_stages=3, most_heads=4),
    (2, 128): AttentionLaunch(keys=32, num_warps=8, num_stages=3, most_heads=4),
    (2, 256): AttentionLaunch(keys=16, num_warps=8, num_stages=2, most_heads=2),
    (4, 64): AttentionLaunch(keys=32, num_warps=8, num_stages=3, most_heads=2),
    (4, 128): AttentionLaunch(keys=16, num_warps=8, num_stages=3, most_heads=1),
    (4, 256): AttentionLaunch(keys=16, num_warps=8, num_stages=2, most_heads=1),
}
# for data center cards since H100, where a program can have 227 KiB of shared memory
LARGE_PREFILL_LAUNCHES = PREFILL_LAUNCHES | {
    (2, 128): AttentionLaunch(keys=64, num_warps=8, num_stages=3, most_heads=4),
    (2, 256): AttentionLaunch(keys=64, num_warps=8, num_stages=2, most_heads=2),
}
COMBINE_LAUNCH = AttentionLaunch(keys=16, num_warps=4, num_stages=1)


def launch_for(launches: dict[tuple[int, int], AttentionLaunch], q_THE: Tensor) -> AttentionLaunch:
    """The launch for these queries, whose head size is at most 256."""
    size = next(size for size in (64, 128, 256) if q_THE.shape[2] <= size)
    return launches[q_THE.element_size(), size]


def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program can have as much shared memory as ``LARGE_PREFILL_LAUNCHES`` need."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    # AMD's properties lack this limit; theirs are lower
    limit: int = getattr(properties, "shared_memory_per_block_optin", 0)
    return limit >= _LARGE_SHARED_BYTES
