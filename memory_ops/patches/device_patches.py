"""The row patches of a lookup's tokens in tensors on a device, as Triton kernels read them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DevicePatches:
    """The patches of T tokens, in tensors on the device of their rows.

    Attributes:
        spans_T2: int64, the first use of each token, and the one after its last.
        addresses_U: int64, the address of ``PatchedRows.words`` of each use, or 0 if the patch has
            no rows of this table.
        scales_U: fp64, the scale of the deltas of each use.
        num_counted_1: int64, one number: reads of the tokens from this one on are not counted.
    """

    spans_T2: Tensor
    addresses_U: Tensor
    scales_U: Tensor
    num_counted_1: Tensor
