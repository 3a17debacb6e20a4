"""Packed decoder layers, run as the model runs them, and tables that are read around the call."""

import contextlib

import torch

from engine.batch import make_batch
from engine.model.forward_trace import ForwardTrace
from engine.model.packed_decoder import PackedDecoder
from engine.model.rotary import rope_angles
from engine.sampling_params import SamplingParams
from engine.step_plan import SequenceChunk, StepPlan


@contextlib.contextmanager
def threads(number):
    """Run with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


class TableElsewhere:
    """A table whose rows no kernel may read by itself."""

    fetched_capacity = None

    def __init__(self, table):
        self.start, self.start_dots = table.start, table.start_dots
        self.hint, self.statistics = table.hint, table.statistics
        self.num_rows, self.value_dim = table.num_rows, table.value_dim

    def row_source(self, layer):
        return None


class PackedForward:
    """A model's layers, packed, which gives its weights up."""

    def __init__(self, model, native):
        self.model = model
        self.decoder = PackedDecoder(model.model.layers, model.config.num_heads, native)

    def __call__(self, num_tokens, first_id=0):
        """What the layers make of two prompts' embeddings, and what their memories read."""
        ids = tuple(first_id + i % 7 for i in range(num_tokens))
        params = SamplingParams()
        chunks = [SequenceChunk("a", ids, 0, tuple(range(20)), params, 0, True)]
        if num_tokens > 1:
            chunks.append(SequenceChunk("b", ids[1:4], 0, tuple(range(20, 25)), params, 0, True))
        batch = make_batch(StepPlan(tuple(chunks)), 8, torch.device("cpu"))
        config, residual = self.model.config, self.model.model.embed_tokens(batch.ids_T)
        shape = (config.num_layers, 25, 2, config.num_kv_heads, 8, config.head_dim)
        kv_blocks = torch.zeros(shape, dtype=residual.dtype)
        angles = rope_angles(batch.layout.positions_T, self.model.rope_frequencies.float())
        trace = ForwardTrace()
        out = self.decoder.run(residual, batch.layout, angles, kv_blocks, trace, lambda: None)
        return out, trace.memory
