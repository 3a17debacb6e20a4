"""The host table on streams that run in whatever order its events allow."""

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
from tests.memory_ops.fake_streams import HEIR, Choice, FakeDevice
from tests.memory_ops.table_kinds import rows_of, table_of

CPU = torch.device("cpu")
NUM_ROWS, WIDTH = 9, 4
WRONG_ROW = NUM_ROWS - 1


class PlainReads:
    """What a host table asks of its cache, by the reference, when its stream comes to it."""

    def __init__(self, table_RV: Tensor, device: FakeDevice) -> None:
        """Begin to be made, on the caller's stream."""
        self.table_RV = torch.full_like(table_RV, torch.nan)
        device.caller.run(lambda: self.table_RV.copy_(table_RV))
        self.hinted: list[Tensor] = []
        self.has_strayed = False  # read what nobody had computed, or had lost

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
        # a GPU would read outside of the table
        self.has_strayed |= bool((rows == WRONG_ROW).any() or operand.isnan().any())


class Caller:
    """A model that looks rows up: each step computes operands, and copies what came of them."""

    def __init__(self, device: FakeDevice, table: HostTable, reads: PlainReads) -> None:
        self.device, self.table, self.reads = device, table, reads
        self.stream = device.another_caller()
        self.pairs: list[tuple[Tensor, Tensor]] = []  # what came, and what should have
        self.hints: list[Tensor] = []

    def later(self, right: Tensor, wrong: float) -> Tensor:
        """A tensor whose stream has yet to compute it."""
        tensor = torch.full_like(right, wrong)
        self.stream.run(lambda: tensor.copy_(right))
        return tensor

    def rows(self) -> tuple[Tensor, Tensor]:
        """Row ids, and as the stream will compute them."""
        right = torch.randint(0, WRONG_ROW, (2, 1, 3))
        return right, self.later(right, WRONG_ROW)

    def look_up(self, dots: bool = False):
        """Start a lookup; what is returned finishes it."""
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
            came = torch.empty_like(result)
            self.stream.run(lambda: came.copy_(result))
            self.pairs.append((came, exact))
            self.forget(rows, WRONG_ROW)
            self.forget(given, torch.nan)
            self.forget(result, torch.nan)

        return finish

    def forget(self, tensor: Tensor, filler: float) -> None:
        """Let the stream use a tensor's memory for another, which has to stay as it is."""
        self.device.reuse(tensor, lambda: tensor.fill_(filler))
        self.pairs.append((tensor, torch.full_like(tensor, filler)))

    def drop_a_lookup(self) -> None:
        """Start a lookup that nobody finishes."""
        before = len(self.device.kept)
        rows, weights = self.rows()[1], self.later(torch.rand(2, 1, 3), torch.nan)
        self.device.caller = self.stream
        self.table.start(rows, weights)
        gc.collect()
        (result,) = (t for t in self.device.kept[before:] if t is not rows and t is not weights)
        for tensor, filler in ((rows, WRONG_ROW), (weights, torch.nan), (result, 7.0)):
            self.forget(tensor, filler)

    def hint(self) -> None:
        right, rows = self.rows()
        self.device.caller = self.stream
        self.table.hint(rows)
        self.forget(rows, WRONG_ROW)
        self.hints.append(right)

    def is_right(self) -> bool:
        hints = zip(self.reads.hinted, self.hints, strict=True)
        return (
            not self.reads.has_strayed
            and all(torch.equal(*pair) for pair in hints)
            and all(torch.allclose(*pair, equal_nan=True) for pair in self.pairs)
        )


def plain_table(device: FakeDevice) -> tuple[HostTable, PlainReads]:
    rows_RV = torch.randn(NUM_ROWS, WIDTH)
    reads = PlainReads(rows_RV, device)
    return HostTable(rows_RV, reads, device.pair()), reads


def a_model_runs(device: FakeDevice) -> Caller:
    """One caller: hints, lookups one after another and two at once, one that is given up."""
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
    """Each stream as far ahead of the others as it gets, then whatever chance chooses."""
    by_place = [
        lambda able, order=order: min(able, key=lambda stream: order.index(stream.place))
        for order in itertools.permutations(places)
    ]
    draws = [random.Random(seed) for seed in range(8)]
    return by_place + [lambda able, draw=draw: draw.choice(able) for draw in draws]


def outcomes(ignored: int = -1) -> Iterator[bool]:
    """Whether all is right, by order."""
    for choose in orders(0, 1, 2, HEIR):
        device = FakeDevice(ignored)
        caller = a_model_runs(device)
        device.run(choose)
        yield caller.is_right()


def test_every_order_that_events_allow_gives_the_right_rows():
    assert all(outcomes())


def number_of_waits() -> int:
    device = FakeDevice()
    a_model_runs(device)
    return device.waits


# a table waits once, a hint once and keeps a tensor, a lookup waits twice, one that is given up
# once and keeps three tensors
def test_waits_are_as_few_as_they_can_be():
    assert number_of_waits() == 1 + 2 + 3 * 2 + 1 + 3


@pytest.mark.parametrize("ignored", range(13))
def test_without_any_one_wait_some_order_gives_others(ignored):
    assert not all(outcomes(ignored))


def test_callers_on_streams_of_their_own_share_a_table():
    for choose in orders(0, 1, 2, 3, HEIR)[::5]:
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
    """A host table by the kernels, whose cache has room for 4 rows."""
    memory = table if isinstance(table, Tensor) else table.records_RB
    row_bytes = memory.shape[1] * memory.element_size()
    cache_bytes = 12 * row_bytes + 4 * (row_bytes + 16)
    cache = RowCache(table, cache_bytes, home, num_ways=2, beside=12)
    return HostTable(table, cache, device.pair())


def test_a_cache_holds_some_rows_and_no_kernel_of_the_cpu_reads_them():
    table = real_table(torch.randn(40, WIDTH), FakeDevice())
    assert table.fetched_capacity == 4 and table.row_source(0) is None


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_rows_are_replaced_by_lookups_that_overlap_and_all_are_right(kind):
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
    device.run(lambda able: able[0])  # and with it goes what the fake stream held
    del rows, weights
    assert all(ref() is not None for ref in alive)
    lookup.finish()
    assert all(ref() is None for ref in alive)


def test_what_follows_a_join_follows_hints():
    device = FakeDevice()
    host = real_table(torch.randn(9, 4), device)
    seen: list[Tensor] = []
    host.hint(torch.arange(3))
    host.join()
    device.caller.run(lambda: seen.append(host._cache.sets.tags_SW.clone()))
    device.run(lambda able: able[-1])
    assert (seen[0] >= 0).any()


def test_what_cannot_be_looked_up_is_refused():
    host = real_table(torch.randn(9, 4), FakeDevice())
    assert (host.num_rows, host.value_dim) == (9, 4)
    rows, weights = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="rows and weights"):
        host.start(rows, weights[:, :, :1])
    with pytest.raises(ValueError, match="rows and x"):
        host.start_dots(rows, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="x: the Triton kernels read"):
        host.start_dots(rows, torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"layer: 1 is outside \[0, 1\)"):
        host.start(rows, weights, 1)
    with pytest.raises(ValueError, match=r"layer: -1 is outside"):
        host.hint(rows, -1)
    with pytest.raises(ValueError, match="rows: expected int64"):
        host.hint(rows.int())
    with pytest.raises(ValueError, match="weights: .* no gradients"):
        host.start(rows, weights.clone().requires_grad_())
    with pytest.raises(ValueError, match="rows: 13 a token, and at most 12"):
        host.start(torch.zeros(1, 1, 13, dtype=torch.int64), torch.zeros(1, 1, 13))
    assert not host.statistics()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    table = torch.zeros(9, 4)
    with pytest.raises(ValueError, match="table_tier: host .* not for cpu"):
        host_table(table, 2**20, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="table_tier: host needs cuda, and torch finds 0 GPUs"):
        host_table(table, 2**20, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="table_tier: host needs cuda:2, and torch finds 2 GPUs"):
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
        with pytest.raises(ValueError, match="rows: on cpu, .* looked up by meta"):
            call()
    with pytest.raises(ValueError, match="table: .* rows and their operands on cpu and meta"):
        host.start(rows, weights.to("meta"))
