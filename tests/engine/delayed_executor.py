"""An executor on the CPU that delays every step until its results are asked for, like a GPU."""

from collections import deque
from dataclasses import replace

import torch

from engine.executors.batch import Batch, StepResult
from engine.executors.executor import make_executor
from engine.sampling.choice import NO_TOKEN


class DelayedExecutor:
    """Runs batches of another executor one by one, in order, as late as it may.

    Like a device, it fills in pending tokens by seat.
    """

    steps_ahead = 1
    balance_rows = 8

    def __init__(self, executor, max_num_seqs: int) -> None:
        self.config, self.num_blocks = executor.config, executor.num_blocks
        self.tables, self.progress = executor.tables, executor.progress
        self.recorder, self.device = executor.recorder, executor.device
        self.largest_ahead = 0
        self._executor = executor
        self._queue: deque[DelayedStep] = deque()
        self._last_token = torch.full((max_num_seqs,), NO_TOKEN)

    def launch(self, batch: Batch) -> "DelayedStep":
        assert len(self._queue) <= self.steps_ahead, "an earlier step was not waited for"
        self._queue.append(DelayedStep(self, batch))
        self.largest_ahead = max(self.largest_ahead, len(self._queue) - 1)
        return self._queue[-1]

    def warm_up(self) -> None:
        self._executor.warm_up()

    def run(self, step: "DelayedStep") -> StepResult:
        assert self._queue.popleft() is step, "steps were waited for out of order"
        batch = step.batch
        ids_T = batch.ids_T.clone()
        is_pending = ids_T < 0
        seats = -1 - ids_T[is_pending]
        assert (self._last_token[seats] != NO_TOKEN).all()
        ids_T[is_pending] = self._last_token[seats]
        result = self._executor.launch(replace(batch, ids_T=ids_T)).wait()
        starts = torch.tensor(batch.query_starts)
        for at, token_id in zip(batch.logits_at_L.tolist(), result.token_ids, strict=False):
            sequence = int(torch.searchsorted(starts, at, right=True)) - 1
            # the row after a failed choice runs too, and is not used
            self._last_token[batch.seats[sequence]] = max(token_id, 0)
        return result


class DelayedStep:
    """A step in flight."""

    def __init__(self, executor: DelayedExecutor, batch: Batch) -> None:
        self.batch, self._executor = batch, executor

    def wait(self) -> StepResult:
        return self._executor.run(self)


def delayed(model, config) -> DelayedExecutor:
    """The executor that serves a model, one step in flight."""
    return DelayedExecutor(make_executor(model, config), config.max_num_seqs)
