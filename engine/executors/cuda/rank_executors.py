"""CUDA executors of tensor-parallel ranks: all run the same steps, only rank 0 chooses tokens."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.executors.batch import Batch, DeviceLostError
from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.device import Device
from engine.executors.cuda.executor import CudaExecutor
from engine.executors.cuda.launched_step import CudaStep
from engine.executors.cuda.step import DeviceModel, DeviceRank, StepOutputs
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.messages import CaptureStep, RunForward, RunStep
from engine.executors.parallel.rank_loop import Work
from engine.executors.parallel.ranks import Ranks
from engine.executors.parallel.shared_patches import SharedPatches
from engine.model.row_patches import RowPatch


class FirstRankExecutor(CudaExecutor):
    """Runs rank 0's share in this process, and makes the other ranks run each step.

    Rank 0 decides about the shape of each step, and about graphs. So all ranks launch, capture and
    replay the same collectives in the same order. At the start of a step, rank 0 sends the tokens
    that it chose last, which pending tokens stand for. If a step fails on any rank, no step can run
    any more. If ``warm_up`` fails, only ``close`` may follow.
    """

    def __init__(
        self,
        model: DeviceModel,
        config: EngineConfig,
        device: Device,
        num_blocks: int,
        rank: DeviceRank,
        ranks: Ranks,
    ) -> None:
        """Reserve memory as ``CudaExecutor``; all ranks have ``num_blocks`` blocks."""
        super().__init__(model, config, device, num_blocks)
        self._group, self._ranks = rank.group, ranks
        self._patches = SharedPatches(rank.share, ranks, self.device)

    def share_patch(self, patch: RowPatch) -> RowPatch:
        """``SharedPatches.share``."""
        return self._patches.share(patch)

    def launch(self, batch: Batch) -> CudaStep:
        try:
            return super().launch(batch)
        except Exception as error:
            raise self._lost(error) from error

    def logits(self, batch: Batch) -> Tensor:
        """Run the forward; logits ``[L, vocabulary]`` at the batch's ``logits_at_L``."""
        try:
            return super().logits(batch)
        except Exception as error:
            raise self._lost(error) from error

    def close(self) -> None:
        """End the other ranks' processes, and free the graphs; does nothing the second time."""
        self._ranks.close()
        # a step may be in flight, and wait for the ranks that have ended
        self._group.leave(self._runner.free_graphs)

    def _queue(
        self,
        batch: Batch,
        then: Callable[[StepOutputs], None],
        shape: StepShape | None = None,
    ) -> None:
        shape = shape or self._shape_of(batch)
        patches = self._patches.of_batch(batch)
        forward = RunForward.of(batch, patches, self._patches.take_freed())
        message = RunStep(forward, tuple(batch.seats), shape)
        self._send(message)
        super()._queue(batch, then, shape)

    def _capture(self, shape: StepShape) -> None:
        self._send(CaptureStep(shape))
        super()._capture(shape)

    def _lost(self, error: Exception) -> DeviceLostError:
        if isinstance(error, RankLostError):
            self._ranks.await_report()
        return DeviceLostError(f"a tensor-parallel step failed: {error}")

    def _send(self, message: RunStep | CaptureStep) -> None:
        self._ranks.send([message] * (self._group.size - 1))


class OtherRankExecutor(CudaExecutor):
    """Runs the share of another rank, as rank 0 says."""

    @torch.inference_mode()
    def follow(self, message: Work, patches: Mapping[int, RowPatch]) -> None:
        """Queue a step, or capture its graph; ``patches`` are those of ``rank_loop.follow``."""
        if isinstance(message, CaptureStep):
            # like rank 0, which waits for the step that compiles the kernels
            self._device.record().wait()
            self._capture(message.shape)
            return
        assert isinstance(message, RunStep)
        self._queue(message.batch(patches), lambda outputs: None, message.shape)
