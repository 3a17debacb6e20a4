"""A step in flight on the GPU, and its results when they have arrived in pinned memory."""

from collections.abc import Sequence

from torch import Tensor

from engine.executors.batch import StepResult
from engine.executors.cuda.device import DeviceEvent
from engine.executors.cuda.scored_tokens import ScoredTokens
from engine.executors.cuda.traced_tokens import TracedTokens
from engine.model.row_patches import PatchSet
from engine.progress import Progress
from engine.sampling.choice import NO_TOKEN


class CudaStep:
    """The chosen tokens, the log-probabilities and the traces of one step."""

    def __init__(
        self,
        event: DeviceEvent,
        chosen_L: Tensor,
        scored: ScoredTokens,
        traced: TracedTokens,
        progress: Progress,
        patches: Sequence[PatchSet],
    ) -> None:
        """``event`` lies behind the copies to ``chosen``, pinned int64, ``scored``, ``traced``.

        The step keeps ``patches``, which it reads on the device, although their requests may end
        while it is in flight.
        """
        self._event, self._chosen_L = event, chosen_L
        self._scored, self._traced, self._progress = scored, traced, progress
        self._patches = patches

    def wait(self) -> StepResult:
        self._event.wait()
        self._progress.mark()
        ids: list[int] = self._chosen_L.tolist()
        logprobs = {
            at: entry
            for at, entry in self._scored.results()
            if at >= len(ids) or ids[at] != NO_TOKEN
        }
        return StepResult(ids, logprobs, self._traced.results())
