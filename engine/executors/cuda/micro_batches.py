"""Runs the layers of a step on the GPU; its micro-batches alternate while the host fetches rows.

A lookup of a table on disk makes the host wait for the row ids, and then for the disk. The device
has one queue, so it stands still unless the host has launched other work before. So the layers of
another micro-batch are launched between the start of a lookup and the wait for its rows:

    device   A: layers, row ids | B: layers  | A: rows | B: row ids | A: layers  | B: rows | ...
    host                          reads A's rows                      reads B's rows

Only the first part of a lookup overlaps: the rows of the first ``NUM_OVERFLOW`` references of each
micro-batch, such as 128 tokens of 4 heads x 32 rows. The host fetches each later part when the
device has read the one before it, and nothing else is queued meanwhile.

Later tokens of a sequence may be in a later micro-batch: in each layer it runs after the earlier
ones, whose keys and values it reads.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from engine.executors.cuda.layers import CudaLayer
from engine.executors.cuda.memory import Pieces
from engine.executors.cuda.step_tokens import StepTokens
from engine.executors.lookahead import Lookahead
from engine.executors.micro_batch_count import SplitRule
from engine.model.forward_trace import ForwardTrace
from memory_ops.tables.host_cache_size import NUM_OVERFLOW

# Two micro-batches overlap fetches; four of a long prompt also shorten the work before the first
# fetch and after the last one, and still have enough tokens to use each weight that they read.
_COUNTS = ((1024, 4), (32, 2))
# How long a step takes without fetches, which is what each micro-batch after the first may add, if
# the step is bound by the weights that it reads again: launches, then bytes. Fewer rows than a disk
# reads in this time are not worth it. None of these was timed on a GPU.
_LAUNCHES_S = 1e-3
_WEIGHT_BYTES_PER_S = 3e12
_READS_PER_S = 400_000


def split_rule(weight_bytes: int) -> SplitRule:
    """When to split the steps of a model with weights of this size, without its tables."""
    seconds = _LAUNCHES_S + weight_bytes / _WEIGHT_BYTES_PER_S
    return SplitRule(_COUNTS, least_rows=seconds * _READS_PER_S, most_references=NUM_OVERFLOW)


# the most hints of a step about one table for each memory layer that reads it: in each micro-batch,
# a lookahead predicts rows, and a PEER layer hints those of its second table
HINTS_PER_LAYER = 2 * max(count for _, count in _COUNTS)


class _MicroBatch:
    """The layers of one micro-batch, run piece by piece; ``result`` is None until the last one."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self.result: Tensor | None = None

    def advance(self) -> None:
        """Run the next piece."""
        try:
            next(self._pieces)
        except StopIteration as end:
            self.result = end.value


def run_layers(
    layers: Sequence[CudaLayer],
    residual_TD: Tensor,
    tokens: Sequence[StepTokens],
    kv_blocks: Sequence[Tensor] | Tensor,
    trace: ForwardTrace,
    lookahead: Lookahead | None = None,
) -> Tensor:
    """Return the residual stream after the last layer; ``residual_TD`` may change.

    Args:
        layers: the decoder layers.
        residual_TD: the embedded tokens of the step.
        tokens: the micro-batches.
        kv_blocks: KV blocks of each layer.
        trace: the traces of the step are added to it.
        lookahead: predicts rows of each micro-batch.
    """
    traces = [ForwardTrace() for _ in tokens]
    runs = [
        _MicroBatch(_pieces(layers, residual_TD[one.part], one, kv_blocks, own, lookahead))
        for one, own in zip(tokens, traces, strict=True)
    ]
    if len(runs) == 1:
        while runs[0].result is None:
            runs[0].advance()
    else:
        _alternate(runs)
    trace.extend_by_parts(traces)
    found = [run.result for run in runs if run.result is not None]
    return found[0] if len(found) == 1 else torch.cat(found)


def _alternate(runs: Sequence[_MicroBatch]) -> None:
    """Run all to their ends; all have equally many pieces, three of them for each lookup."""
    fetching: _MicroBatch | None = None
    for run in chain.from_iterable(iter(lambda: runs, None)):
        run.advance()  # to its choice of rows, or to its end
        if fetching is not None:
            fetching.advance()  # waits for rows on the host, while the device runs the work above
            fetching = None
        if run.result is None:
            run.advance()  # the table's places are free again
            fetching = run
        elif run is runs[-1]:
            return


def _pieces(
    layers: Sequence[CudaLayer],
    residual_TD: Tensor,
    tokens: StepTokens,
    kv_blocks: Sequence[Tensor] | Tensor,
    trace: ForwardTrace,
    lookahead: Lookahead | None,
) -> Pieces:
    """All layers on one micro-batch."""
    for index, layer in enumerate(layers):
        if lookahead is not None:
            lookahead.before(index, tokens.with_padding(residual_TD))
        residual_TD = yield from layer.pieces(residual_TD, tokens, kv_blocks[index], trace)
    return residual_TD
