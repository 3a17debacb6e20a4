"""The executor of a tensor-parallel model: rank 0, which makes all ranks run each forward."""

from torch import Tensor

from engine.executors.batch import Batch, DeviceLostError
from engine.executors.eager import EagerExecutor
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.messages import RunForward
from engine.executors.parallel.ranks import Ranks
from engine.executors.parallel.shared_patches import SharedPatches
from engine.executors.parallel.shares import RankShare
from engine.model.forward_trace import ForwardTrace
from engine.model.row_patches import RowPatch
from engine.model.transformer import Transformer


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
        self._num_others, self._ranks = share.size - 1, ranks
        self._patches = SharedPatches(share, ranks, self.device)

    def share_patch(self, patch: RowPatch) -> RowPatch:
        """``SharedPatches.share``."""
        return self._patches.share(patch)

    def close(self) -> None:
        """End the processes of the other ranks; does nothing the second time."""
        self._ranks.close()

    def _forward(self, batch: Batch, trace: ForwardTrace | None = None) -> Tensor:
        try:
            patches = self._patches.of_batch(batch)
            message = RunForward.of(batch, patches, self._patches.take_freed())
            self._ranks.send([message] * self._num_others)
            return super()._forward(batch, trace)
        except Exception as error:
            if isinstance(error, RankLostError):
                self._ranks.await_report()
            raise DeviceLostError(f"a tensor-parallel forward failed: {error}") from error
