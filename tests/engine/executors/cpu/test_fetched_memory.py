"""Memory layers that fetch rows inside the native call, in every runnable build."""

import copy
import ctypes
import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.native.row_fetcher import FINISH, START, STILL_READING, RowFetcher
from memory_ops.row_formats import RowRecords
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.value_table import TableReadError
from tests.engine.executors.cpu.packed_forward import PackedForward, UnreadableTable, threads
from tests.memory_ops.table_kinds import table_of
from tests.models import feed_forward_changes, random_model, tiny_config

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
each_build = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
each_number = pytest.mark.parametrize("num_threads", [1, 2, 3])

OFFSET = 4096
HEADS, TOP_K = 2, 4
TOKEN_ROWS = HEADS * TOP_K


class ReadInside(DiskTable):
    """A disk table that only native kernels may read."""

    def start(self, rows_THK, weights_THK, layer=0):
        raise AssertionError("a memory layer was left out of the native call")


def model_of(*kinds, dtype=torch.float32, **memory):
    sizes = {"num_heads": HEADS, "num_subkeys": 19, "top_k": TOP_K, "query_dim": 10}
    changes = feed_forward_changes(*kinds, **(sizes | {"value_dim": 30} | memory))
    return random_model(tiny_config(**changes), dtype)


class StoredTables:
    """Random rows of all tables of a model, in memory and in files."""

    def __init__(self, config, kind, folder):
        shape = config.memory.num_rows, config.memory.value_dim
        self.rows = {name: table_of(kind, torch.randn(shape)) for name in config.table_names}
        self.files = {name: folder / name for name in self.rows}
        for name, file in self.files.items():
            file.write_bytes(b"x" * OFFSET + self.content(name).numpy().tobytes())

    def content(self, name):
        rows = self.rows[name]
        return rows.records_RB if isinstance(rows, RowRecords) else rows.view(torch.uint8)

    def in_memory(self, model):
        """A copy of the model with its rows in memory."""
        held = {name: DeviceTable(rows) for name, rows in self.rows.items()}
        return with_tables(model, held)

    def on_disk(self, model, slots, made=ReadInside, **options):
        """A copy of the model with its rows on disk and a cache of ``slots`` rows."""
        return with_tables(
            model, {name: self.table(name, slots, made, **options) for name in self.rows}
        )

    def table(self, name, slots, made=ReadInside, **options):
        rows, row_bytes = self.rows[name], self.content(name).shape[1]
        is_plain = isinstance(rows, torch.Tensor)
        shape = self.content(name).shape[0], rows.shape[1] if is_plain else rows.value_dim
        row_format = rows.dtype if is_plain else rows.row_format
        cache_bytes = row_cache_bytes(slots, row_bytes, shape[0])
        return made(self.files[name], OFFSET, shape, row_format, cache_bytes, **options)


def with_tables(model, tables):
    other = copy.deepcopy(model)
    other.attach_tables(tables)
    return other


def best_forward(model):
    return PackedForward(model, CpuKernels(CPU_LIBRARY.best_build))


@pytest.fixture
def model():
    """A model with two memory layers that share a table."""
    return model_of("memory_plus", "dense", "memory_plus")


@pytest.fixture
def stored(model, tmp_path):
    return StoredTables(model.config, "fp32", tmp_path)


def table_in(forward, layer=0):
    return forward.model.model.layers[layer].memory.table


@each_build
@pytest.mark.parametrize(
    "kind",
    [
        *("fp32", "bf16", "int8", "int4"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("fp16", "int4_row", "fp8")),
    ],
)
@settings(max_examples=15)
@given(
    layer_kind=st.sampled_from(["memory_plus", "pkm"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_tokens=st.sampled_from([1, 3, 64, 150]),
    num_threads=st.sampled_from([1, 2, 3]),
    # slots for the rows of one token, of a few tokens, of all tokens
    slots=st.sampled_from([TOKEN_ROWS, 50, 1000]),
    value_dim=st.sampled_from([1, 30, 300]),
    share_values=st.booleans(),
    options=st.sampled_from([{}, {"threads": 2}, {"is_direct": False}]),
)
def test_outputs_equal_those_of_rows_in_memory_bit_for_bit(
    build, kind, tmp_path_factory, layer_kind, dtype, num_tokens, num_threads, slots, options, **own
):
    projects = {"value_projection": True} if layer_kind == "pkm" else {}
    model = model_of(layer_kind, "dense", layer_kind, dtype=dtype, **own, **projects)
    stored = StoredTables(model.config, kind, tmp_path_factory.mktemp("tables"))
    native = CpuKernels(build)
    with threads(num_threads):
        wanted, wanted_reads = PackedForward(stored.in_memory(model), native)(num_tokens)
        forward = PackedForward(stored.on_disk(model, slots, **options), native)
        for _ in range(2):  # with an empty cache, then with a filled one
            found, reads = forward(num_tokens)
            assert torch.equal(found, wanted)
            for own, other in zip(reads, wanted_reads, strict=True):
                assert torch.equal(own.rows_THK, other.rows_THK)
                assert torch.equal(own.weights_THK, other.weights_THK)


@pytest.mark.parametrize("num_tokens", [1, 20, 100])
@pytest.mark.parametrize("slots", [TOKEN_ROWS, 50, 1000])
def test_lookups_inside_the_call_are_counted_like_those_outside(model, stored, num_tokens, slots):
    inside = best_forward(stored.on_disk(model, slots))
    table = stored.table("memory.table", slots, DiskTable)
    around = copy.deepcopy(model)
    for layer in around.config.memory_layers:
        around.model.layers[layer].memory.attach(UnreadableTable(table))
    around = best_forward(around)
    for _ in range(2):
        _, reads = inside(num_tokens)
        around(num_tokens)
    found, wanted = table_in(inside).statistics(), table.statistics()
    assert set(found) == set(wanted) == {0, 2}
    for layer in found:
        own, other = found[layer], wanted[layer]
        # a row whose read ends at that moment may count as hit or late
        assert own.hits + own.late == other.hits + other.late
        for name in ("requested_rows", "lookups", "unique_rows", "misses", "bytes_read"):
            assert getattr(own, name) == getattr(other, name) > 0, name
        assert own.lookups == 2
    if slots == 1000:
        # the other layer and the next step hit the rows that one layer has read
        sets = [set(read.rows_THK.flatten().tolist()) for read in reads]
        assert [found[layer].unique_rows for layer in (0, 2)] == [2 * len(one) for one in sets]
        assert found[0].misses == len(sets[0]) and found[2].misses == len(sets[1] - sets[0])


@each_number
@pytest.mark.parametrize("slots", [TOKEN_ROWS, 50])
def test_a_failed_read_fails_only_its_call(model, stored, slots, num_threads):
    fault = ReadFault(37, -errno.EIO)
    forward = best_forward(stored.on_disk(model, slots, fault=fault))
    wanted = best_forward(stored.in_memory(model))
    outcomes = {"right": 0, "failed": 0}
    with threads(num_threads):
        for first_id in range(60):
            right, reads = wanted(1, first_id)
            try:
                found, _ = forward(1, first_id)
            except TableReadError as error:
                # leaked pins would leave no slots for the next token
                outcomes["failed"] += 1
                message = str(error).removeprefix(f"{stored.files['memory.table']}: row ")
                row = int(message.removesuffix(": Input/output error"))
                assert any((read.rows_THK == row).any() for read in reads)
            else:
                outcomes["right"] += 1
                assert torch.equal(found, right)
    assert outcomes["failed"] > 2 and outcomes["right"] > 20


def test_the_error_names_the_table_whose_read_failed(tmp_path):
    model = model_of("memory_plus", "memory_plus", share_values=False)
    stored = StoredTables(model.config, "fp32", tmp_path)
    whole, broken = stored.files
    other = with_tables(
        model,
        {
            whole: stored.table(whole, 50),
            # every read is short
            broken: stored.table(broken, 50, fault=ReadFault(1, 8)),
        },
    )
    forward = best_forward(other)
    with pytest.raises(TableReadError, match="row [0-9]+: the file ends before this row") as raised:
        forward(3)
    assert str(raised.value).startswith(f"{stored.files[broken]}: ")
    # a failed call does not read rows of later layers
    counts = [table_in(forward, layer).statistics() for layer in (0, 1)]
    assert counts[0][0].hits + counts[0][0].misses > 0 and counts[1][1].misses > 0


def test_a_failure_after_some_tokens_fails_the_call(model, stored):
    # the rows of some tokens have been read before the failure
    forward = best_forward(stored.on_disk(model, TOKEN_ROWS, fault=ReadFault(60, -errno.EIO)))
    with pytest.raises(TableReadError, match="Input/output error"):
        forward(100)
    assert table_in(forward).statistics()[0].misses >= 60
    wanted, _ = best_forward(stored.in_memory(model))(1, 9)
    assert torch.equal(forward(1, 9)[0], wanted)


def test_a_cache_too_small_for_one_token_is_an_error(model, stored):
    forward = best_forward(stored.on_disk(model, TOP_K - 1))
    for _ in range(2):
        with pytest.raises(TableReadError, match="one token's rows do not fit in memory"):
            forward(3)


def test_slots_of_another_lookup_are_not_taken(model, stored):
    wanted, reads = best_forward(stored.in_memory(model))(3)
    forward = best_forward(stored.on_disk(model, TOKEN_ROWS, made=DiskTable))
    read = {int(row) for one in reads for row in one.rows_THK.flatten()}
    others = [row for row in range(model.config.memory.num_rows) if row not in read]
    rows_THK = torch.tensor(others[:TOKEN_ROWS]).view(1, HEADS, TOP_K)
    lookup = table_in(forward).start(rows_THK, torch.ones(rows_THK.shape))
    with pytest.raises(TableReadError, match="one token's rows do not fit in memory"):
        forward(3)
    rows = stored.rows["memory.table"]
    torch.testing.assert_close(lookup.finish()[0], rows[rows_THK.flatten()].sum(0))
    assert torch.equal(forward(3)[0], wanted)


def overwrite(file):
    """Overwrite a file in place with other bytes."""
    file.write_bytes(b"x" * file.stat().st_size)
    os.utime(file, ns=(0, 0))


def test_a_changed_file_is_not_read_again(model, stored):
    forward = best_forward(stored.on_disk(model, 50))
    forward(3)
    before = table_in(forward).statistics()
    overwrite(stored.files["memory.table"])
    with pytest.raises(
        TableReadError, match=r"memory\.table: the file changed after it was opened"
    ):
        forward(3, 100)
    assert table_in(forward).statistics() == before


class InterceptedFetcher(ReadInside):
    """A table that intercepts the calls of kernels to its row fetcher."""

    def row_source(self, layer):
        source = super().row_source(layer)
        own = RowFetcher.from_address(source.fetcher_address)
        start, finish = START(own.start), FINISH(own.finish)
        calls = (
            START(lambda *arguments: self.intercept_start(start, *arguments)),
            FINISH(lambda *arguments: self.intercept_finish(finish, *arguments)),
        )
        addresses = (ctypes.cast(call, ctypes.c_void_p).value for call in calls)
        intercepted = RowFetcher(*addresses, own.release, own.on_progress, own.own, own.layer)
        self.held = [*getattr(self, "held", ()), own, start, finish, *calls, intercepted]
        source.fetcher_address = ctypes.addressof(intercepted)
        return source

    def intercept_start(self, start, *arguments):
        return start(*arguments)

    def intercept_finish(self, finish, *arguments):
        return finish(*arguments)


class ChangedDuringCall(InterceptedFetcher):
    """A table whose file changes when a lookup starts."""

    def intercept_start(self, start, *arguments):
        overwrite(self.file)
        return start(*arguments)


def test_a_file_that_changes_during_a_call_is_an_error(model, stored):
    forward = best_forward(stored.on_disk(model, 50, made=ChangedDuringCall))
    with pytest.raises(
        TableReadError, match=r"memory\.table: the file changed after it was opened"
    ):
        forward(3)


class StillReading(InterceptedFetcher):
    """A table whose next ``waits`` finish calls report that reads are still in flight."""

    waits = 0

    def intercept_finish(self, finish, *arguments):
        if self.waits:
            self.waits -= 1
            return STILL_READING
        return finish(*arguments)


@each_number
def test_watchers_are_called_while_a_lookup_is_in_flight(model, stored, num_threads):
    forward = best_forward(stored.on_disk(model, 50, made=StillReading))
    table, waits_at_calls = table_in(forward), []
    table.watch(lambda: waits_at_calls.append(table.waits))
    wanted, _ = best_forward(stored.in_memory(model))(3)
    with threads(num_threads):
        forward(3)
        calls_per_forward = len(waits_at_calls)
        # watchers are called once per memory layer
        assert calls_per_forward > 0 and set(waits_at_calls) == {0}
        table.waits = 5
        assert torch.equal(forward(3)[0], wanted)
    assert waits_at_calls[calls_per_forward:] == [4, 3, 2, 1, 0] + [0] * calls_per_forward


class OutOfRange(InterceptedFetcher):
    """A table that replaces the last requested row id by one outside the table."""

    def intercept_start(self, start, own, rows, tokens, token_rows, *others):
        beyond = ctypes.c_int64(self.num_rows)
        ctypes.memmove(rows + 8 * (tokens * token_rows - 1), ctypes.addressof(beyond), 8)
        return start(own, rows, tokens, token_rows, *others)


def test_a_row_outside_the_table_is_an_error(model, stored):
    forward = best_forward(stored.on_disk(model, 50, made=OutOfRange))
    with pytest.raises(TableReadError, match=r"row \d+ is outside the table"):
        forward(3)
