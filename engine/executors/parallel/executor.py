"""The executor of a tensor-parallel model: rank 0, which makes all ranks run each forward."""

import itertools
import threading
import weakref
from dataclasses import dataclass, replace

from torch import Tensor

from engine.executors.batch import Batch, DeviceLostError
from engine.executors.eager import EagerExecutor
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.messages import AddPatch, RunForward
from engine.executors.parallel.ranks import Ranks
from engine.executors.parallel.shares import RankShare
from engine.model.forward_trace import ForwardTrace
from engine.model.row_patches import RowPatch
from engine.model.transformer import Transformer


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


class ParallelExecutor(EagerExecutor):
    """Runs rank 0's share in this process; only here are tokens chosen.

    If a forward fails on any rank, the ranks are at different places, and no step can run any more.
    """

    def __init__(
        self, model: Transformer, num_blocks: int, block_size: int, share: RankShare, ranks: Ranks
    ) -> None:
        """Reserve the KV memory of rank 0's heads; all ranks have ``num_blocks`` blocks.

        Raises:
            KvMemoryError: as ``EagerExecutor``.
        """
        super().__init__(model, num_blocks, block_size, kv_config=share.kv_config)
        self._shares = [replace(share, rank=rank) for rank in range(share.size)]
        self._ranks = ranks
        self._numbers = itertools.count()
        # a patch may die, and be freed, while this thread holds the lock
        self._lock = threading.RLock()
        # numbers of the living patches by identity, and of those that died since the last message
        self._known: dict[int, int] = {}
        self._freed: list[int] = []

    def share_patch(self, patch: RowPatch) -> RowPatch:
        """Give each rank its columns of a patch on the CPU; returns rank 0's. Any thread may call.

        Raises:
            RankLostError: a rank has died.
        """
        number = next(self._numbers)
        freed = self._take_freed()
        try:
            for share in self._shares[1:]:  # one rank's copy at a time is in memory
                message = AddPatch.of(number, patch, share.value_columns, freed)
                self._ranks.send_to(share.rank, message)
            own = AddPatch.of(number, patch, self._shares[0].value_columns)
            layers = own.patch().to(self.device).layers
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

    def close(self) -> None:
        """End the processes of the other ranks; does nothing the second time."""
        self._ranks.close()

    def _take_freed(self) -> list[int]:
        with self._lock:
            freed, self._freed = self._freed, []
            return freed

    def _free(self, identity: int) -> None:
        with self._lock:
            self._freed.append(self._known.pop(identity))

    def _forward(self, batch: Batch, trace: ForwardTrace | None = None) -> Tensor:
        try:
            with self._lock:
                patches = [
                    [(self._known[id(patch)], scale) for patch, scale in uses]
                    for uses in batch.patches
                ]
            message = RunForward.of(batch, patches, self._take_freed())
            self._ranks.send([message] * (len(self._shares) - 1))
            return super()._forward(batch, trace)
        except Exception as error:
            if isinstance(error, RankLostError):
                self._ranks.await_report()
            raise DeviceLostError(f"a tensor-parallel forward failed: {error}") from error
