"""Test helpers: packed decoder layers, and tables that native kernels cannot read."""

import contextlib

import torch

from engine.executors.cpu.executor import CpuExecutor
from engine.model.attention import kv_memory
from engine.model.forward_trace import ForwardTrace
from engine.sampling.params import SamplingParams
from engine.scheduling.batching import Batcher
from engine.scheduling.step_plan import SequenceChunk, StepPlan


@contextlib.contextmanager
def threads(number):
    """Run a block with this number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


class UnreadableTable:
    """A table whose rows native kernels cannot read."""

    fetched_capacity = None

    def __init__(self, table):
        self.start, self.start_dots = table.start, table.start_dots
        self.hint, self.statistics = table.hint, table.statistics
        self.num_rows, self.value_dim = table.num_rows, table.value_dim

    def row_source(self, layer):
        return None


class PackedForward:
    """The packed layers of a model."""

    def __init__(self, model, kernels):
        self.model = model
        self.executor = CpuExecutor(model, kernels, num_blocks=25, block_size=8)

    def __call__(self, num_tokens, first_id=0):
        """Run two prompts; return (hidden states, rows and weights read by memory layer)."""
        ids = tuple(first_id + i % 7 for i in range(num_tokens))
        params = SamplingParams()
        chunks = [SequenceChunk("a", ids, 0, tuple(range(20)), params, 0, True)]
        if num_tokens > 1:
            chunks.append(SequenceChunk("b", ids[1:4], 0, tuple(range(20, 25)), params, 0, True))
        batch = batch_of_chunks(chunks, 8)
        kv_blocks = kv_memory(self.model.config, 25, 8, self.model.model.norm.weight)
        trace = ForwardTrace()
        out = self.executor.run_layers(batch.ids_T, batch.layout, kv_blocks, trace)
        return out, trace.memory


def batch_of_chunks(chunks, block_size):
    """The batch of a step plan with these chunks."""
    return Batcher(block_size, frozenset()).batch(StepPlan(tuple(chunks)))
