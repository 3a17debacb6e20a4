"""Records which rows memory layers read: the rows of traced tokens, and each row's reads."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.executors.batch import Batch
from engine.executors.row_usage import RowUsage
from engine.model.config import ModelConfig
from engine.model.forward_trace import ForwardTrace
from engine.request import MemoryRead

# one step of this many is counted, so that counting costs little
_COUNT_EVERY = 16
# rows of each memory layer that a trace lists
MAX_TRACED_ROWS = 8


class MemoryRecorder:
    """Follows the steps of one executor.

    Attributes:
        layers: indices of the memory layers.
        usage: reads of the tables, by their names.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.layers = config.memory_layers
        self.usage: dict[str, RowUsage] = {}
        self._usage_of_layers: list[RowUsage] = []
        self._num_steps = 0
        for layer in self.layers:
            assert config.memory is not None
            name = config.layer_tables(layer).values
            if name not in self.usage:
                self.usage[name] = RowUsage(config.memory.num_rows, device)
            self._usage_of_layers.append(self.usage[name])

    def begin(self, batch: Batch) -> "StepReads":
        """The record of the next step."""
        is_counted = bool(self.layers) and self._num_steps % _COUNT_EVERY == 0
        self._num_steps += 1
        return StepReads(self, batch, is_counted)

    def count(self, trace: ForwardTrace, num_tokens: int) -> None:
        """Count the rows that a step's first tokens read."""
        for usage, memory in zip(self._usage_of_layers, trace.memory, strict=True):
            usage.add(memory.rows_THK[:num_tokens])


class StepReads:
    """The rows that one step reads, as far as somebody wants to know them.

    Attributes:
        places: places in ``logits_at_L`` whose requests are traced.
        tokens_P: their tokens in the batch, int64.
        trace: to be filled by the forward; None if nobody needs it.
    """

    def __init__(self, recorder: MemoryRecorder, batch: Batch, is_counted: bool) -> None:
        self._recorder, self._is_counted = recorder, is_counted
        self._num_tokens = len(batch.ids_T)
        self.places = [at for at, row in enumerate(batch.rows) if row.params.memory_trace]
        self.tokens_P = batch.logits_at_L[self.places] if self.places else batch.logits_at_L[:0]
        self.trace = ForwardTrace() if is_counted or self.places else None

    def count(self, trace: ForwardTrace) -> None:
        """Count the reads of the step, if it is one that is counted."""
        if self._is_counted:
            self._recorder.count(trace, self._num_tokens)

    def finish(self) -> Mapping[int, tuple[MemoryRead, ...]]:
        """Count the reads of ``trace``, and return those of traced tokens by place."""
        if self.trace is None:
            return {}
        self.count(self.trace)
        return self.by_place(*traced_rows(self.trace, self.tokens_P)) if self.places else {}

    def by_place(
        self, rows_MPF: Tensor, weights_MPF: Tensor
    ) -> Mapping[int, tuple[MemoryRead, ...]]:
        """One read per memory layer for each place, from ``traced_rows`` of ``tokens_P``."""
        by_layer = [
            [_read(layer, *pair) for pair in zip(rows_PF, weights_PF, strict=True)]
            for layer, rows_PF, weights_PF in zip(
                self._recorder.layers, rows_MPF.tolist(), weights_MPF.tolist(), strict=True
            )
        ]
        return dict(zip(self.places, zip(*by_layer, strict=True), strict=True))


def traced_rows(trace: ForwardTrace, tokens_P: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that M memory layers read for these tokens, and their weights, ``[M, P, H K]``."""
    rows = [one.rows_THK.index_select(0, tokens_P).flatten(1) for one in trace.memory]
    weights = [one.weights_THK.index_select(0, tokens_P).flatten(1) for one in trace.memory]
    return torch.stack(rows), torch.stack(weights)


def _read(layer: int, rows: Sequence[int], weights: Sequence[float]) -> MemoryRead:
    # heads may read the same row
    total: dict[int, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        total[row] = total.get(row, 0.0) + weight
    top = sorted(total, key=lambda row: -total[row])[:MAX_TRACED_ROWS]
    return MemoryRead(layer, tuple(top), tuple(total[row] for row in top))
