"""Pipelined micro-batches: results equal those of unsplit steps bit for bit."""

import errno

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executors.cpu.executor import CpuExecutor
from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.lookahead import LookaheadConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.layout import PagedKv, TokenLayout
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.value_table import TableReadError
from tests.engine.executors.cpu.packed_forward import threads
from tests.engine.executors.cpu.test_fetched_memory import StoredTables, model_of
from tests.engine.patches import with_patches
from tests.models import ragged_step

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")

BLOCK = 8
NUM_ROWS = 19 * 19
TOKEN_ROWS = 2


def batch_of(sequences, first_id=0):
    """A step of sequences (cached tokens, new tokens), each with separate KV blocks."""
    parts, used = [], 0
    for name, (before, new) in enumerate(sequences):
        number = -(-(before + new) // BLOCK)
        ids = [first_id + (13 * name + 7 * i) % 100 for i in range(new)]
        parts.append((ids, before, range(used, used + number)))
        used += number
    return ragged_step(parts, BLOCK), used


class Forward:
    """Runs the packed layers of a model; returns hidden states and KV blocks."""

    def __init__(self, model, lookahead=None):
        kernels = CpuKernels(CPU_LIBRARY.best_build)
        self.model = model
        self.executor = CpuExecutor(model, kernels, 1, BLOCK, lookahead)
        self.executor.progress.mark = self.mark
        self.marks = 0

    def mark(self):
        self.marks += 1

    @torch.inference_mode()
    def __call__(self, batch, kv_blocks, trace=None):
        written = kv_blocks.clone()
        return self.executor.run_layers(*batch, written, trace), written


def traced(trace):
    """Everything in a trace."""
    reads = [tensor.tolist() for memory in trace.memory for tensor in memory]
    return reads, [tensor.tolist() for tensor in trace.router_logits]


def kv_of(model, blocks, dtype=torch.float32):
    config = model.config
    shape = (config.num_layers, blocks, 2, config.num_kv_heads, BLOCK, config.head_dim)
    return torch.randn(shape).to(dtype)


def small_reads(*kinds, **memory):
    """A model that reads two of 361 rows per token: a few tokens do not read nearly all rows."""
    return model_of(*kinds, num_heads=1, top_k=TOKEN_ROWS, value_dim=32, **memory)


@settings(max_examples=25)
@given(
    kinds=st.sampled_from(
        [("memory_plus", "dense", "memory_plus"), ("dense", "pkm", "pkm", "dense"), ("peer", "moe")]
    ),
    sequences=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 120)), min_size=1, max_size=6),
    fits_all_rows=st.booleans(),
    num_threads=st.sampled_from([1, 2]),
    reader=st.sampled_from([{}, {"threads": 2}]),
    kind=st.sampled_from(["fp32", "bf16", "int4"]),
    lookahead=st.sampled_from([None, LookaheadConfig(1, 2), LookaheadConfig(2, 1)]),
    is_patched=st.booleans(),
    beside=st.sampled_from([{}, {"scalar_gate": True}, {"output_gate": True}, None]),
)
def test_outputs_equal_those_of_rows_in_memory_bit_for_bit(
    tmp_path_factory,
    kinds,
    sequences,
    fits_all_rows,
    num_threads,
    reader,
    kind,
    lookahead,
    is_patched,
    beside,
):
    options = {} if beside is None or "moe" in kinds else {"placement": "beside", **beside}
    model = small_reads(*kinds, **options)
    stored = StoredTables(model.config, kind, tmp_path_factory.mktemp("tables"))
    batch, blocks = batch_of(sequences)
    if is_patched and "peer" not in kinds:
        ids_T, layout = batch
        batch = ids_T, with_patches(layout, stored.in_memory(model))
    kv_blocks = kv_of(model, blocks)
    slots = NUM_ROWS if fits_all_rows else len(batch[0]) * TOKEN_ROWS
    with threads(num_threads):
        trace = ForwardTrace()
        wanted, written = Forward(stored.in_memory(model))(batch, kv_blocks, trace)
        forward = Forward(stored.on_disk(model, slots, DiskTable, **reader), lookahead)
        for _ in range(2):  # with an empty cache, then with a filled one
            own_trace = ForwardTrace()
            found, own = forward(batch, kv_blocks, own_trace)
            assert torch.equal(found, wanted)
            assert torch.equal(own, written)
            assert traced(own_trace) == traced(trace)


class RecordingTable(DiskTable):
    """A disk table that records start and finish of lookups by layer and number of tokens."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.events = []

    def start(self, rows_THK, weights_THK, layer=0):
        lookup, key = super().start(rows_THK, weights_THK, layer), (layer, len(rows_THK))
        self.events.append(("start", *key))
        finish = lookup.finish
        lookup.finish = lambda: self.events.append(("finish", *key)) or finish()
        return lookup


def table_in(forward):
    return forward.model.layers[0].memory.table


def test_fetches_of_one_micro_batch_overlap_compute_of_another(tmp_path):
    model = small_reads("memory_plus", "dense", "memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, NUM_ROWS, RecordingTable))
    batch, blocks = batch_of([(0, 70), (5, 31)])
    forward(batch, kv_of(model, blocks))
    first, second = 50, 51  # tokens of each micro-batch
    assert table_in(forward).events == [
        ("start", 0, first),
        ("start", 0, second),
        ("finish", 0, first),
        ("start", 2, first),
        ("finish", 0, second),
        ("start", 2, second),
        ("finish", 2, first),
        ("finish", 2, second),
    ]
    assert forward.marks == 2 * 3  # one mark per layer and micro-batch


@pytest.mark.parametrize(
    ("tokens", "slots", "parts"),
    [
        (31, NUM_ROWS, 0),
        (32, NUM_ROWS, 2),
        (32, 32 * TOKEN_ROWS, 2),
        (32, 32 * TOKEN_ROWS - 1, 0),
        (255, NUM_ROWS, 2),
        (256, NUM_ROWS, 4),
        (256, NUM_ROWS - 1, 0),
    ],
)
def test_large_steps_are_split_if_the_cache_holds_all_rows(tmp_path, tokens, slots, parts):
    model = small_reads("dense", "memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, slots, RecordingTable))
    table = forward.model.layers[1].memory.table
    batch, blocks = batch_of([(3, tokens)])
    forward(batch, kv_of(model, blocks))
    assert [event[0] for event in table.events] == ["start"] * parts + ["finish"] * parts
    # an unsplit step reads the rows in the native call
    assert table.statistics()[1].lookups == (parts or 1)


def test_steps_are_split_while_the_previous_one_missed_rows(tmp_path):
    model = small_reads("memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, 100 * TOKEN_ROWS, RecordingTable))
    events = table_in(forward).events
    kv_blocks = kv_of(model, 16)
    one, few, other = (batch_of([(0, n)], first)[0] for n, first in ((100, 0), (1, 0), (100, 100)))
    forward(one, kv_blocks)
    forward(few, kv_blocks)  # small steps do not count
    forward(one, kv_blocks)  # split: the previous large step missed many rows
    assert len(events) == 2 * 2 * 2
    forward(one, kv_blocks)
    assert len(events) == 8
    forward(other, kv_blocks)  # new rows, but still unsplit: the previous step missed none
    assert len(events) == 8
    forward(one, kv_blocks)
    assert len(events) == 12
    lookups = table_in(forward).statistics()[0].lookups
    assert lookups == 3 * 2 + 3


def test_rows_are_prefetched_for_every_micro_batch(tmp_path):
    model = small_reads("dense", "memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, NUM_ROWS, DiskTable), LookaheadConfig(1, 2))
    batch, blocks = batch_of([(0, 100)])
    forward(batch, kv_of(model, blocks))
    counted = forward.model.layers[1].memory.table.statistics()[1]
    assert 0 < counted.prefetched_used <= counted.prefetched
    assert counted.lookups == 2


def test_steps_with_rows_in_memory_are_not_split(tmp_path):
    model = small_reads("memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.in_memory(model))
    batch, blocks = batch_of([(0, 300)])
    forward(batch, kv_of(model, blocks))
    assert forward.marks == 1


@pytest.mark.parametrize("every", [1, 100, 250])
def test_a_failed_micro_batch_fails_the_step_and_frees_its_slots(tmp_path, every):
    model = small_reads("memory_plus", "memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    batch, blocks = batch_of([(0, 128)])
    kv_blocks = kv_of(model, blocks)
    wanted, _ = Forward(stored.in_memory(model))(batch, kv_blocks)
    fault = ReadFault(every, -errno.EIO)
    forward = Forward(stored.on_disk(model, 128 * TOKEN_ROWS, DiskTable, fault=fault))
    right = 0
    for _ in range(6):
        try:
            found, _ = forward(batch, kv_blocks)
        except TableReadError as error:
            assert "Input/output error" in str(error)
        else:
            right += 1
            assert torch.equal(found, wanted)
    assert right == 0 if every == 1 else right > 0


def test_a_part_of_a_layout_has_matching_sequences_and_contexts():
    paged = PagedKv(torch.arange(9) * 10, torch.arange(6).view(3, 2), (7, 3, 4))
    layout = TokenLayout(torch.tensor([4, 5, 6, 1, 2, 0, 1, 2, 3]), (0, 3, 5, 9), paged)
    part = layout.part(1, 7)
    assert part.query_starts == (0, 2, 4, 6)
    assert part.positions_T.tolist() == [5, 6, 1, 2, 0, 1]
    assert part.paged is not None and part.paged.context_lengths == (7, 3, 2)
    assert part.paged.kv_index_T.tolist() == [10, 20, 30, 40, 50, 60]
    last = layout.part(7, 9)
    assert last.query_starts == (0, 2) and last.paged.context_lengths == (4,)
    assert last.paged.block_table_SB.tolist() == [[4, 5]]
