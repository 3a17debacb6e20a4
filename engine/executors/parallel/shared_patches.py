"""Row patches of a tensor-parallel model: each rank has its columns, and knows them by a number."""

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.executors.batch import Batch
from engine.executors.parallel.messages import AddPatch
from engine.executors.parallel.ranks import Ranks
from engine.executors.parallel.shares import RankShare
from engine.model.row_patches import RowPatch


@dataclass(frozen=True)
class SharedPatch(RowPatch):
    """Rank 0's columns of a patch.

    Attributes:
        whole_bytes: bytes of the whole patch, which all ranks together have in memory.
    """

    whole_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.whole_bytes


class SharedPatches:
    """Sends patches to the other ranks, and numbers them."""

    def __init__(self, share: RankShare, ranks: Ranks, device: torch.device) -> None:
        """``share`` is rank 0's, ``device`` the one of its patches."""
        self._shares = [replace(share, rank=rank) for rank in range(share.size)]
        self._ranks, self._device = ranks, device
        self._numbers = itertools.count()
        # a patch may die, and be freed, while this thread holds the lock
        self._lock = threading.RLock()
        # numbers of the living patches by identity, and of those that died since the last message
        self._known: dict[int, int] = {}
        self._freed: list[int] = []

    def share(self, patch: RowPatch) -> RowPatch:
        """Give each rank its columns of a patch on the CPU; returns rank 0's. Any thread may call.

        Raises:
            RankLostError: a rank has died.
        """
        number = next(self._numbers)
        freed = self.take_freed()
        try:
            for share in self._shares[1:]:  # one rank's copy at a time is in memory
                message = AddPatch.of(number, patch, share.value_columns, freed)
                self._ranks.send_to(share.rank, message)
            own = AddPatch.of(number, patch, self._shares[0].value_columns)
            layers = own.patch().to(self._device).layers
            kept = SharedPatch(patch.content_hash, layers, patch.num_bytes)
        except BaseException:
            # some ranks may have the patch; a rank ignores numbers that it does not know
            with self._lock:
                self._freed += [*freed, number]
            raise
        with self._lock:
            self._known[id(kept)] = number
        weakref.finalize(kept, self._free, id(kept))
        return kept

    def of_batch(self, batch: Batch) -> Sequence[Sequence[tuple[int, float]]]:
        """Numbers and scales of the patches of each sequence."""
        with self._lock:
            return [
                [(self._known[id(patch)], scale) for patch, scale in uses] for uses in batch.patches
            ]

    def take_freed(self) -> list[int]:
        """Numbers of the patches that died since the last call; send them to the ranks."""
        with self._lock:
            freed, self._freed = self._freed, []
            return freed

    def _free(self, identity: int) -> None:
        with self._lock:
            self._freed.append(self._known.pop(identity))
