"""The row patches that each token of a lookup uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from memory_ops.patches.patched_rows import PatchedRows

# of tokens without patches
NO_SET = -1


class PatchUse(NamedTuple):
    """A patch's rows of the table, and the scale of its deltas."""

    patch: PatchedRows
    scale: float


@dataclass(frozen=True)
class TokenPatches:
    """The patches of T tokens.

    Attributes:
        sets: sets of patches, which add up in this order.
        set_T: int32 on the CPU, the number of each token's set, or ``NO_SET``.
    """

    sets: Sequence[Sequence[PatchUse]]
    set_T: Tensor

    def part(self, first: int, last: int) -> "TokenPatches":
        """The patches of the tokens ``[first, last)``."""
        return TokenPatches(self.sets, self.set_T[first:last])
