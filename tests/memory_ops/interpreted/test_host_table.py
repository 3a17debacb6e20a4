"""The host table on fake streams, in every order that its events allow."""

import gc
import itertools
import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from memory_ops import reference
from memory_ops.tables.host import HostTable, host_table
from memory_ops.tables.row_cache import RowCache
from memory_ops.triton_kernels import gather_rows, row_dots
from tests.memory_ops.fake_streams import REUSER, Choice, FakeDevice
from tests.memory_ops.table_kinds import rows_of, table_of

CPU = torch.device("cpu")
NUM_ROWS, WIDTH = 9, 4
WRONG_ROW = NUM_ROWS - 1


class PlainReads:
    """A fake row cache that computes with the reference when its stream runs."""

    def __init__(self, table_RV: Tensor, device: FakeDevice) -> None:
        """Queue the initialisation on the caller's stream."""
        self.table_RV = torch.full_like(table_RV, torch.nan)
        device.caller.run(lambda: self.table_RV.copy_(table_RV))
        self.hinted: list[Tensor] = []
        self.counts = torch.zeros(1, 1, dtype=torch.int64)
        self.has_read_garbage = False  # read memory before it was computed or after it was reused

    def check_hint(self, rows: Tensor, layer: int) -> None: ...

    def check_lookup(self, rows_THK: Tensor, layer: int) -> None: ...

    def gather_rows(self, out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, layer: int):
        self._note(rows_THK, weights_THK)
        out_TV.copy_(reference.gather_rows(self.table_RV, rows_THK, weights_THK))

    def row_dots(self, dots_THK: Tensor, rows_THK: Tensor, x_TV: Tensor, layer: int) -> None:
        self._note(rows_THK, x_TV)
        dots_THK.copy_(reference.row_dots(self.table_RV, rows_THK, x_TV))

    def hint(self, rows: Tensor, layer: int) -> None:
        self._note(rows, torch.zeros(1))
        self.hinted.append(rows.clone())

    def _note(self, rows: Tensor, operand: Tensor) -> None:
        # on a GPU, such ids would lie outside the table
        self.has_read_garbage |= bool((rows == WRONG_ROW).any() or operand.isnan().any())


class Caller:
    """A fake model: its steps compute operands, look rows up and copy the results."""

    def __init__(self, device: FakeDevice, table: HostTable, reads: PlainReads) -> None:
        self.device, self.table, self.reads = device, table, reads
        self.stream = device.another_caller()
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (found, expected)
        self.hints: list[Tensor] = []

    def later(self, right: Tensor, wrong: float) -> Tensor:
        """A tensor that holds ``wrong`` until the stream has computed ``right``."""
        tensor = torch.full_like(right, wrong)
        self.stream.run(lambda: tensor.copy_(right))
        return tensor

    def rows(self) -> tuple[Tensor, Tensor]:
        """Row ids, and a tensor into which the stream computes them later."""
        right = torch.randint(0, WRONG_ROW, (2, 1, 3))
        return right, self.later(right, WRONG_ROW)

    def look_up(self, dots: bool = False):
        """Start a lookup; return a function that finishes it."""
        right, rows = self.rows()
        if dots:
            operand = torch.randn(2, WIDTH)
            exact = reference.row_dots(self.table.rows, right, operand)
        else:
            operand = torch.rand(2, 1, 3)
            exact = reference.gather_rows(self.table.rows, right, operand)
        given = self.later(operand, torch.nan)
        self.device.caller = self.stream
        lookup = (self.table.start_dots if dots else self.table.start)(rows, given)

        def finish() -> None:
            self.device.caller = self.stream
            result = lookup.finish()
            copied = torch.empty_like(result)
            self.stream.run(lambda: copied.copy_(result))
            self.pairs.append((copied, exact))
            self.release(rows, WRONG_ROW)
            self.release(given, torch.nan)
            self.release(result, torch.nan)

        return finish

    def release(self, tensor: Tensor, filler: float) -> None:
        """Let another tensor reuse the memory; nothing may overwrite it afterwards."""
        self.device.reuse(tensor, lambda: tensor.fill_(filler))
        self.pairs.append((tensor, torch.full_like(tensor, filler)))

    def drop_a_lookup(self) -> None:
        """Start a lookup and drop it without finishing it."""
        before = len(self.device.kept)
        rows, weights = self.rows()[1], self.later(torch.rand(2, 1, 3), torch.nan)
        self.device.caller = self.stream
        self.table.start(rows, weights)
        gc.collect()
        (result,) = (t for t in self.device.kept[before:] if t is not rows and t is not weights)
        for tensor, filler in ((rows, WRONG_ROW), (weights, torch.nan), (result, 7.0)):
            self.release(tensor, filler)

    def hint(self) -> None:
        right, rows = self.rows()
        self.device.caller = self.stream
        self.table.hint(rows)
        self.release(rows, WRONG_ROW)
        self.hints.append(right)

    def is_right(self) -> bool:
        hints = zip(self.reads.hinted, self.hints, strict=True)
        return (
            not self.reads.has_read_garbage
            and all(torch.equal(*pair) for pair in hints)
            and all(torch.allclose(*pair, equal_nan=True) for pair in self.pairs)
        )


def plain_table(device: FakeDevice) -> tuple[HostTable, PlainReads]:
    rows_RV = torch.randn(NUM_ROWS, WIDTH)
    reads = PlainReads(rows_RV, device)
    return HostTable(rows_RV, reads, device.pair()), reads


def run_model(device: FakeDevice) -> Caller:
    """One caller: a hint, a lookup, two overlapping lookups and a dropped one."""
    table, reads = plain_table(device)
    caller = Caller(device, table, reads)
    caller.hint()
    caller.look_up()()
    first, second = caller.look_up(), caller.look_up(dots=True)
    caller.drop_a_lookup()
    first()
    second()
    return caller


def orders(*places: int) -> list[Choice]:
    """Every order of priority of the streams, then random choices of several seeds."""
    by_place = [
        lambda ready, order=order: min(ready, key=lambda stream: order.index(stream.place))
        for order in itertools.permutations(places)
    ]
    draws = [random.Random(seed) for seed in range(8)]
    return by_place + [lambda ready, draw=draw: draw.choice(ready) for draw in draws]


def outcomes(ignored: int = -1) -> Iterator[bool]:
    """For each order of the streams, whether all results are right."""
    for choose in orders(0, 1, 2, REUSER):
        device = FakeDevice(ignored)
        caller = run_model(device)
        device.run(choose)
        yield caller.is_right()


@pytest.mark.slow
def test_every_allowed_order_gives_the_right_rows():
    assert all(outcomes())


def number_of_waits() -> int:
    device = FakeDevice()
    run_model(device)
    return device.waits


# a table waits once; a hint waits once and keeps a tensor; a lookup waits twice; a dropped lookup
# waits once and keeps three tensors
def test_the_table_waits_the_minimal_number_of_times():
    assert number_of_waits() == 1 + 2 + 3 * 2 + 1 + 3


@pytest.mark.parametrize(
    "ignored", [pytest.param(n, marks=[pytest.mark.slow] if n % 6 else []) for n in range(13)]
)
def test_without_any_one_wait_some_order_gives_wrong_rows(ignored):
    assert not all(outcomes(ignored))


def test_callers_on_separate_streams_share_a_table():
    for choose in orders(0, 1, 2, 3, REUSER)[::5]:
        device = FakeDevice()
        table, reads = plain_table(device)
        one, other = Caller(device, table, reads), Caller(device, table, reads)
        for _ in range(2):
            finishes = [one.look_up(), other.look_up(), one.look_up(dots=True)]
            for finish in (finishes[1], finishes[0], finishes[2]):
                finish()
        device.run(choose)
        assert one.is_right() and other.is_right()


def real_table(table, device: FakeDevice, home: torch.device = CPU) -> HostTable:
    """A host table with the real kernels and a cache of 4 rows."""
    memory = table if isinstance(table, Tensor) else table.records_RB
    row_bytes = memory.shape[1] * memory.element_size()
    cache_bytes = 12 * row_bytes + 4 * (row_bytes + 16)
    cache = RowCache(table, cache_bytes, home, num_ways=2, num_overflow=12)
    return HostTable(table, cache, device.pair())


def test_cpu_kernels_do_not_read_a_host_table():
    table = real_table(torch.randn(40, WIDTH), FakeDevice())
    assert table.fetched_capacity == 4 and table.row_source(0) is None


@pytest.mark.parametrize("kind", ["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def test_overlapping_lookups_evict_rows_and_are_right(kind):
    table, x = table_of(kind, torch.randn(20, 33)), torch.randn(2, 33)
    for choose in orders(0, 1)[:3]:
        device = FakeDevice()
        host = real_table(table, device)
        rows = [rows_of(table, 2, 2, 3) for _ in range(3)]
        weights = torch.rand(2, 2, 3)
        host.hint(rows[1])
        first, second = host.start(rows[0], weights), host.start(rows[1], weights)
        out = [second.finish(), first.finish(), host.start_dots(rows[2], x).finish()]
        device.run(choose)
        assert torch.equal(out[0], gather_rows(table, rows[1], weights))
        assert torch.equal(out[1], gather_rows(table, rows[0], weights))
        assert torch.equal(out[2], row_dots(table, rows[2], x))
        counted = host.statistics()[0]
        assert (counted.lookups, counted.requested_rows) == (3, 36)
        assert counted.misses and counted.prefetched


def test_a_lookup_holds_its_operands_until_it_is_finished():
    device = FakeDevice()
    host = real_table(torch.randn(9, 4), device)
    rows, weights = rows_of(torch.empty(9, 4), 1, 1, 2), torch.rand(1, 1, 2)
    alive = [weakref.ref(rows), weakref.ref(weights)]
    lookup = host.start(rows, weights)
    device.run(lambda ready: ready[0])  # which drops the fake stream's references
    del rows, weights
    assert all(ref() is not None for ref in alive)
    lookup.finish()
    assert all(ref() is None for ref in alive)


def test_work_after_a_join_follows_hints():
    device = FakeDevice()
    host = real_table(torch.randn(9, 4), device)
    seen: list[Tensor] = []
    host.hint(torch.arange(3))
    host.join()
    device.caller.run(lambda: seen.append(host._cache.sets.tags_SW.clone()))
    device.run(lambda ready: ready[-1])
    assert (seen[0] >= 0).any()


def test_wrong_lookups_are_refused():
    host = real_table(torch.randn(9, 4), FakeDevice())
    assert (host.num_rows, host.value_dim) == (9, 4)
    rows, weights = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="rows and weights"):
        host.start(rows, weights[:, :, :1])
    with pytest.raises(ValueError, match="rows and x"):
        host.start_dots(rows, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="x: the Triton kernels support"):
        host.start_dots(rows, torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"layer: 1 is outside \[0, 1\)"):
        host.start(rows, weights, 1)
    with pytest.raises(ValueError, match=r"layer: -1 is outside"):
        host.hint(rows, -1)
    with pytest.raises(ValueError, match="rows: expected int64"):
        host.hint(rows.int())
    with pytest.raises(ValueError, match="weights: .* do not support gradients"):
        host.start(rows, weights.clone().requires_grad_())
    with pytest.raises(ValueError, match="rows: a token reads 13 rows, at most 12"):
        host.start(torch.zeros(1, 1, 13, dtype=torch.int64), torch.zeros(1, 1, 13))
    assert not host.statistics()


def test_a_missing_gpu_is_refused(monkeypatch):
    table = torch.zeros(9, 4)
    with pytest.raises(ValueError, match="table_tier: host needs a GPU, not cpu"):
        host_table(table, 2**20, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="table_tier: host needs cuda, but torch finds 0 GPUs"):
        host_table(table, 2**20, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="table_tier: host needs cuda:2, but torch finds 2 GPUs"):
        host_table(table, 2**20, torch.device("cuda", 2))


def test_operands_on_another_device_than_the_cache_are_refused():
    host = real_table(torch.randn(9, 4), FakeDevice(), torch.device("meta"))
    rows, weights = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2)
    calls = (
        lambda: host.start(rows, weights),
        lambda: host.start_dots(rows, torch.zeros(1, 4)),
        lambda: host.hint(rows),
    )
    for call in calls:
        with pytest.raises(ValueError, match="rows: expected row ids on meta, got cpu"):
            call()
    with pytest.raises(ValueError, match="table, rows and operand: .*cpu and meta"):
        host.start(rows, weights.to("meta"))
