"""Steps of many tokens in parts by turns: what one part after another gives, bit for bit."""

import errno

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executors.cpu.executor import CpuExecutor
from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.lookahead import LookaheadConfig
from engine.model.layout import PagedKv, TokenLayout
from engine.sampling.params import SamplingParams
from engine.scheduling.step_plan import SequenceChunk
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.value_table import TableReadError
from tests.engine.executors.cpu.packed_forward import batch_of_chunks, threads
from tests.engine.executors.cpu.test_fetched_memory import StoredTables, model_of

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")

BLOCK = 8
NUM_ROWS = 19 * 19
TOKEN_ROWS = 2


def batch_of(sequences, first_id=0):
    """Sequences of (tokens that are there, tokens of this step), each with blocks of its own."""
    chunks, used = [], 0
    for name, (before, new) in enumerate(sequences):
        number = -(-(before + new) // BLOCK)
        ids = tuple(first_id + (13 * name + 7 * i) % 100 for i in range(new))
        blocks = tuple(range(used, used + number))
        chunks.append(SequenceChunk(str(name), ids, before, blocks, SamplingParams(), 0, True))
        used += number
    return batch_of_chunks(chunks, BLOCK), used


class Forward:
    """Packed layers of a model and what they leave of a batch."""

    def __init__(self, model, lookahead=None):
        kernels = CpuKernels(CPU_LIBRARY.best_build)
        self.model = model
        self.executor = CpuExecutor(model, kernels, 1, BLOCK, lookahead)
        self.executor.progress.mark = self.mark
        self.marks = 0

    def mark(self):
        self.marks += 1

    @torch.inference_mode()
    def __call__(self, batch, kv_blocks):
        written = kv_blocks.clone()
        return self.executor.run_layers(batch.ids_T, batch.layout, written), written


def kv_of(model, blocks, dtype=torch.float32):
    config = model.config
    shape = (config.num_layers, blocks, 2, config.num_kv_heads, BLOCK, config.head_dim)
    return torch.randn(shape).to(dtype)


def small_reads(*kinds, **memory):
    """A model that reads two rows a token, of 361: of few tokens they are not nearly all."""
    return model_of(*kinds, num_heads=1, top_k=TOKEN_ROWS, value_dim=32, **memory)


@settings(max_examples=25)
@given(
    kinds=st.sampled_from(
        [("memory_plus", "dense", "memory_plus"), ("dense", "pkm", "pkm", "dense"), ("peer", "moe")]
    ),
    sequences=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 120)), min_size=1, max_size=6),
    has_room_for_all=st.booleans(),
    num_threads=st.sampled_from([1, 2]),
    way=st.sampled_from([{}, {"threads": 2}]),
    kind=st.sampled_from(["fp32", "bf16", "int4"]),
    lookahead=st.sampled_from([None, LookaheadConfig(1, 2), LookaheadConfig(2, 1)]),
)
def test_bit_for_bit_what_rows_in_memory_give(
    tmp_path_factory, kinds, sequences, has_room_for_all, num_threads, way, kind, lookahead
):
    model = small_reads(*kinds)
    stored = StoredTables(model.config, kind, tmp_path_factory.mktemp("tables"))
    batch, blocks = batch_of(sequences)
    kv_blocks = kv_of(model, blocks)
    slots = NUM_ROWS if has_room_for_all else len(batch.ids_T) * TOKEN_ROWS
    with threads(num_threads):
        wanted, written = Forward(stored.in_memory(model))(batch, kv_blocks)
        turns = Forward(stored.on_disk(model, slots, DiskTable, **way), lookahead)
        for _ in range(2):  # from the file, and of what is there then
            found, own = turns(batch, kv_blocks)
            assert torch.equal(found, wanted)
            assert torch.equal(own, written)


class Told(DiskTable):
    """A table that notes which lookups begin and end, by layer and tokens."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.events = []

    def start(self, rows_THK, weights_THK, layer=0):
        lookup, told = super().start(rows_THK, weights_THK, layer), (layer, len(rows_THK))
        self.events.append(("start", *told))
        finish = lookup.finish
        lookup.finish = lambda: self.events.append(("finish", *told)) or finish()
        return lookup


def table_in(forward):
    return forward.model.layers[0].feed_forward.table


def test_while_one_part_is_fetched_another_goes_on(tmp_path):
    model = small_reads("memory_plus", "dense", "memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, NUM_ROWS, Told))
    batch, blocks = batch_of([(0, 70), (5, 31)])
    forward(batch, kv_of(model, blocks))
    first, second = 50, 51  # tokens of the parts
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
    assert forward.marks == 2 * 3  # each part tells of each layer


@pytest.mark.parametrize(
    ("tokens", "slots", "turns"),
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
def test_turns_are_taken_where_they_gain_and_all_rows_have_room(tmp_path, tokens, slots, turns):
    model = small_reads("dense", "memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, slots, Told))
    table = forward.model.layers[1].feed_forward.table
    batch, blocks = batch_of([(3, tokens)])
    forward(batch, kv_of(model, blocks))
    assert [event[0] for event in table.events] == ["start"] * turns + ["finish"] * turns
    # without turns the native call has read them
    assert table.statistics()[1].lookups == (turns or 1)


def test_turns_are_taken_while_rows_are_fetched(tmp_path):
    model = small_reads("memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, 100 * TOKEN_ROWS, Told))
    events = table_in(forward).events
    kv_blocks = kv_of(model, 16)
    one, few, other = (batch_of([(0, n)], first)[0] for n, first in ((100, 0), (1, 0), (100, 100)))
    forward(one, kv_blocks)
    forward(few, kv_blocks)  # which says nothing of many
    forward(one, kv_blocks)  # the last one of many has fetched much
    assert len(events) == 2 * 2 * 2
    forward(one, kv_blocks)
    assert len(events) == 8
    forward(other, kv_blocks)  # whose rows are others: as a whole yet
    assert len(events) == 8
    forward(one, kv_blocks)
    assert len(events) == 12
    lookups = table_in(forward).statistics()[0].lookups
    assert lookups == 3 * 2 + 3


def test_guesses_are_made_for_every_part(tmp_path):
    model = small_reads("dense", "memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.on_disk(model, NUM_ROWS, DiskTable), LookaheadConfig(1, 2))
    batch, blocks = batch_of([(0, 100)])
    forward(batch, kv_of(model, blocks))
    counted = forward.model.layers[1].feed_forward.table.statistics()[1]
    assert 0 < counted.prefetched_used <= counted.prefetched
    assert counted.lookups == 2


def test_rows_in_memory_take_no_turns(tmp_path):
    model = small_reads("memory_plus")
    stored = StoredTables(model.config, "fp32", tmp_path)
    forward = Forward(stored.in_memory(model))
    batch, blocks = batch_of([(0, 300)])
    forward(batch, kv_of(model, blocks))
    assert forward.marks == 1


@pytest.mark.parametrize("every", [1, 100, 250])
def test_a_part_that_fails_ends_the_step_and_leaves_its_room(tmp_path, every):
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


def test_a_part_of_a_layout_has_its_own_sequences_and_contexts():
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
