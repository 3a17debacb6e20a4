"""Test helpers: packed decoder layers, their KV blocks, and tables that kernels cannot read."""

import contextlib

import torch

from engine.executors.cpu.executor import CpuExecutor
from engine.model.attention import kv_memory
from engine.model.config import KV_SCALE_BYTES
from engine.model.forward_trace import ForwardTrace
from tests.models import ragged_step


@contextlib.contextmanager
def threads(number):
    """Run a block with this number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def area_order(shape, itemsize):
    """For each number of areas (kv_areas.h), its index in blocks ``[blocks, 2, G, block_size, E]``.

    In int8, the last 4 numbers of a row are the bytes of its scale.
    """
    blocks, _, kv_heads, block_size, row_size = shape
    per_word, head_dim = 4 // itemsize, row_size - (KV_SCALE_BYTES if itemsize == 1 else 0)
    keys, values = torch.arange(shape.numel()).view(shape).unbind(1)
    scales = keys[..., head_dim:].flatten(2), values[..., head_dim:].flatten(2)
    sizes = blocks, kv_heads, block_size, head_dim // per_word, per_word
    words = keys[..., :head_dim].reshape(sizes).transpose(2, 3).flatten(2)
    sizes = blocks, kv_heads, block_size // per_word, per_word, head_dim
    lines = values[..., :head_dim].reshape(sizes).transpose(3, 4).flatten(2)
    return torch.cat([words, lines, *scales], dim=2).flatten()


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
    """The packed layers of a model, without micro-batches."""

    def __init__(self, model, kernels, weight_bits=None):
        self.model = model
        self.executor = CpuExecutor(
            model, kernels, num_blocks=25, block_size=8, weight_bits=weight_bits
        )
        self.executor._decoder._micro_batches.count.of = lambda num_tokens: 1

    def __call__(self, num_tokens, first_id=0):
        """Run two prompts; return (hidden states, rows and weights read by memory layer)."""
        ids = [first_id + i % 7 for i in range(num_tokens)]
        sequences = [(ids, 0, range(20))]
        if num_tokens > 1:
            sequences.append((ids[1:4], 0, range(20, 25)))
        step = ragged_step(sequences, 8)
        kv_blocks = kv_memory(self.model.config, 25, 8, self.model.model.norm.weight)
        trace = ForwardTrace()
        out = self.executor.run_layers(*step, kv_blocks, trace)
        return out, trace.memory
