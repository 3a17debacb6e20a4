"""Row patches in a forward: which patches the tokens use, and lookups that add them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.patches.patch_counts import PatchCounts
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import NO_SET, PatchUse, TokenPatches
from memory_ops.tables.value_table import Lookup


@dataclass(frozen=True)
class RowPatch:
    """A patch that is ready to be used.

    Attributes:
        content_hash: BLAKE3 of its rows and deltas, in hexadecimal.
        layers: its rows for each memory layer whose table it changes; layers may share them.
    """

    content_hash: str
    layers: Mapping[int, PatchedRows]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory."""
        return sum(rows.num_bytes for rows in self.distinct_rows)

    def to(self, device: torch.device) -> "RowPatch":
        """The patch in the memory of a device; its counts begin at 0."""
        moved = {id(rows): rows.to(device) for rows in self.distinct_rows}
        layers = {layer: moved[id(rows)] for layer, rows in self.layers.items()}
        return RowPatch(self.content_hash, layers)

    def counts(self) -> PatchCounts:
        """Row reads since the patch was made. It waits for work on the current stream of a GPU;
        ``CountReader`` does not."""
        counts = [rows.counts.tolist() for rows in self.distinct_rows]
        return PatchCounts(*map(sum, zip((0, 0), *counts, strict=True)))

    @cached_property
    def distinct_rows(self) -> Sequence[PatchedRows]:
        """Its rows of each table, each once."""
        return tuple({id(rows): rows for rows in self.layers.values()}.values())


class ScaledPatch(NamedTuple):
    """A patch and the scale of its deltas."""

    patch: RowPatch
    scale: float


# patches that add up, in canonical order
PatchSet = Sequence[ScaledPatch]


@dataclass(frozen=True)
class ForwardPatches:
    """The patches of the T tokens of a forward.

    Attributes:
        sets: the sets that tokens use.
        set_T: int32 on the CPU, the number of each token's set, or ``NO_SET``.
    """

    sets: Sequence[PatchSet]
    set_T: Tensor

    def part(self, first: int, last: int) -> "ForwardPatches":
        """The patches of the tokens ``[first, last)``."""
        return ForwardPatches(self.sets, self.set_T[first:last])

    def at(self, layer: int) -> TokenPatches:
        """The patches of one memory layer's lookup."""
        sets = [
            [PatchUse(patch.layers[layer], scale) for patch, scale in uses if layer in patch.layers]
            for uses in self.sets
        ]
        return TokenPatches(sets, self.set_T)


def forward_patches(sets: Sequence[PatchSet], query_starts: Sequence[int]) -> ForwardPatches:
    """The patches of concatenated sequences, each with a set, maybe an empty one."""
    numbers: dict[tuple[tuple[int, float], ...], int] = {}
    distinct: list[PatchSet] = []
    set_S = []
    for uses in sets:
        name = tuple((id(patch), scale) for patch, scale in uses)
        if uses and name not in numbers:
            numbers[name] = len(distinct)
            distinct.append(uses)
        set_S.append(numbers.get(name, NO_SET))
    # torch.repeat_interleave would wake torch's threads, which takes longer than a short step
    set_T = np.repeat(np.array(set_S, dtype=np.int32), np.diff(query_starts))
    return ForwardPatches(distinct, torch.from_numpy(set_T))


class _PatchedLookup(NamedTuple):
    """A lookup whose result gets the deltas of its tokens' patches."""

    lookup: Lookup
    rows_THK: Tensor
    weights_THK: Tensor
    patches: TokenPatches

    def finish(self) -> Tensor:
        out_TV = self.lookup.finish()
        operations.add_patched_rows(out_TV, self.rows_THK, self.weights_THK, self.patches)
        return out_TV


def patched(
    lookup: Lookup,
    rows_THK: Tensor,
    weights_THK: Tensor,
    patches: ForwardPatches | None,
    layer: int,
) -> Lookup:
    """A lookup in flight, of one memory layer, with the patches of its tokens if there are any."""
    if patches is None:
        return lookup
    return _PatchedLookup(lookup, rows_THK, weights_THK, patches.at(layer))
