"""Trained tables in host memory: the order of copies, and results equal to the device tier."""

import itertools
import random
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from memory_ops import backends, operations, triton_kernels
from memory_ops.sparse_adam import AdamStep
from memory_ops.tables import working_rows
from memory_ops.tables.streams import StreamPair
from memory_ops.tables.trained import TrainedTable
from memory_ops.tables.trained_host import TrainedHostTable, trained_host_table
from memory_ops.tables.working_rows import WorkingRows
from memory_ops.triton_kernels.copy_rows import copy_rows
from tests.memory_ops.fake_streams import REUSER, Choice, FakeDevice, HostCaller
from tests.memory_ops.test_sparse_adam import MOMENTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 99, 300])
def test_rows_are_copied(dtype, width):
    source, target = torch.randn(9, width).to(dtype), torch.randn(6, width).to(dtype)
    wanted, sources, targets = target.clone(), torch.tensor([8, 0, 8]), torch.tensor([5, 2, 0])
    wanted[targets] = source[sources]
    copy_rows(source, sources, target, targets)
    assert torch.equal(target, wanted)
    copy_rows(source, sources[:0], target, targets[:0])
    assert torch.equal(target, wanted)


def orders() -> list[Choice]:
    """The streams in both orders of priority, then random choices of several seeds."""
    by_place = [
        lambda ready, order=order: min(ready, key=lambda stream: order.index(stream.place))
        for order in itertools.permutations((REUSER, 0, 1))
    ]
    draws = [random.Random(seed) for seed in range(6)]
    return by_place + [lambda ready, draw=draw: draw.choice(ready) for draw in draws]


class Steps:
    """Steps that read rows, then add 1 to the rows read, and 10 and 100 to their moments."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.begin = torch.arange(12.0).view(12, 1).repeat(1, 2)
        self.host = [self.begin.clone(), torch.zeros(12, 2), torch.zeros(12, 2)]
        self.working = WorkingRows(self.host[0], CPU, device.pair())
        self.working.add_moments(self.host[1:])
        self.uses = torch.zeros(12, 1)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (found, expected)

    def start(self, rows: list[int]):
        """Start to fetch rows; return a function that looks them up on the caller's stream."""
        rows_L = torch.tensor(rows)
        are_here = self.working.fetch(rows_L)

        def finish() -> None:
            self.device.caller.wait(are_here)
            copies, places = self.working.rows_PV, self.working.places(rows_L)
            found = torch.zeros(len(rows), 2)
            self.device.caller.run(lambda: found.copy_(copies[places]))
            self.pairs.append((found, self.begin[rows_L] + self.uses[rows_L]))

        return finish

    def update(self, rows: list[int]) -> None:
        rows_U = torch.tensor(rows)
        places_U = self.working.begin_update(rows_U)
        copies = (self.working.rows_PV, *self.working.moments)
        for copy, change in zip(copies, (1.0, 10.0, 100.0), strict=True):
            self.device.caller.run(partial(add, copy, places_U, change))
        freed = [rows_U.clone(), places_U]
        freed += [ids for fetched in self.working._fetched for ids in fetched]
        self.working.end_update(freed[0], places_U)
        for tensor in freed:
            self.device.reuse(tensor, tensor.zero_)
        self.uses[rows_U] += 1

    def is_right(self) -> bool:
        uses = self.uses.expand(12, 2)
        wanted = (self.begin + uses, 10 * uses, 100 * uses)
        return all(torch.equal(*pair) for pair in self.pairs) and all(
            torch.equal(host, one.expand(12, 2))
            for host, one in zip(self.host, wanted, strict=True)
        )


def add(copy: Tensor, places_U: Tensor, change: float) -> None:
    copy[places_U] += change


def run_steps(device: FakeDevice) -> Steps:
    """Steps in which buffers grow, fetches overlap, and an update needs a row that none read."""
    steps = Steps(device)
    finishes = [steps.start([3, 5, 3]), steps.start([5, 7, 7])]
    for finish in finishes:
        finish()
    steps.working.fetch_moments()
    steps.update([3, 5, 7])
    steps.start([7, 3, 0])()
    steps.working.fetch_moments()
    steps.start([1, 2, 3])()
    steps.working.fetch_moments()
    steps.update([0, 1, 3, 7])
    steps.start([9, 3])()
    steps.update([3, 11])
    return steps


@pytest.fixture
def plain_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies without the kernel, so that many orders of streams take little time."""

    def copied(source: Tensor, from_L: Tensor, target: Tensor, to_L: Tensor) -> None:
        target[to_L] = source[from_L]

    monkeypatch.setattr(working_rows, "copy_rows", copied)


@pytest.fixture
def used_memory(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """Buffers in memory that the caller's stream of the last of these devices still writes."""
    devices, buffer = list[FakeDevice](), working_rows._buffer

    def used(*sizes) -> Tensor:
        memory = buffer(*sizes)
        devices[-1].caller.run(partial(memory.fill_, torch.nan))
        return memory

    monkeypatch.setattr(working_rows, "_buffer", used)
    return devices


@pytest.mark.usefixtures("plain_copies")
def test_every_allowed_order_of_copies_is_right(used_memory):
    for choose in orders():
        device = FakeDevice()
        used_memory.append(device)
        steps = run_steps(device)
        device.run(choose)
        assert steps.is_right()


class NamedWaits(FakeDevice):
    """A device that remembers which functions told a stream to wait, or to keep a tensor."""

    def __init__(self, ignored: int = -1) -> None:
        super().__init__(ignored)
        self.names: list[str] = []

    def should_wait(self) -> bool:
        frame, kind = sys._getframe(1), ""
        while frame.f_code.co_name in ("wait", "keep", "join", "_follow_caller"):
            kind = kind or frame.f_code.co_name
            frame = frame.f_back
        self.names.append(f"{kind} in {frame.f_code.co_name}")
        return super().should_wait()


@pytest.mark.usefixtures("plain_copies")
def test_without_its_waits_some_order_of_copies_is_wrong(used_memory):
    device = NamedWaits()
    used_memory.append(device)
    run_steps(device)
    needed = set()
    for ignored in range(device.waits):
        if device.names[ignored] in needed:
            continue
        for choose in orders():
            partly = FakeDevice(ignored)
            used_memory.append(partly)
            steps = run_steps(partly)
            partly.run(choose)
            if not steps.is_right():
                needed.add(device.names[ignored])
                break
    # a fetch follows earlier work on its memory, a lookup its fetch, an update the moments, its
    # copies back the update, and a growing buffer the copies into the smaller one
    assert needed == {
        "wait in fetch",
        "wait in finish",
        "wait in begin_update",
        "wait in end_update",
        "keep in end_update",
        "wait in _reserve",
    }
    assert set(device.names) == needed


def tables(rows_RV: Tensor, choose: Choice) -> tuple[TrainedTable, TrainedHostTable]:
    """The same table in both tiers; the side stream of the second runs when a wait needs it."""
    device = FakeDevice()
    streams = StreamPair(lambda: HostCaller(device, choose), device.side)
    host = TrainedHostTable(rows_RV.clone(), CPU, streams, lambda memory: None)
    return TrainedTable(rows_RV.clone()), host


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_for_device_type", lambda device_type: triton_kernels)


def learn(table: TrainedTable, kind: str, with_dots: bool) -> list[Tensor]:
    """Train a table for three steps of two passes; return all results."""
    torch.manual_seed(3)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    moments = table.new_moments(is_row_wise=kind == "row_wise", dtype=dtype)
    results = []
    for number in range(1, 4):
        for _ in range(2):
            rows, weights = torch.randint(0, 9, (4, 1, 3)), torch.rand(4, 1, 3, requires_grad=True)
            first = table.start(rows, weights)
            if with_dots:
                x = torch.randn(4, 5)
                table.start_dots(rows.flip(0), x).finish().square().sum().backward()
            out = first.finish()
            out.square().sum().backward()
            results += [out.detach(), weights.grad]
        with torch.no_grad():
            results.append(table.start(torch.arange(9).view(9, 1, 1), torch.ones(9, 1, 1)).finish())
            results.append(table.start_dots(rows, torch.ones(4, 5)).finish())
        reads = table.take_reads()
        groups = operations.group_rows(reads.rows_THK, reads.weights_THK)
        step = AdamStep.at(number, 0.1, (0.9, 0.95), 1e-8, is_row_wise=kind == "row_wise")
        table.update(moments, groups, reads.grad_TV, step)
    table.synchronize()
    return [*results, table.table_RV, *(one for one in moments if one is not None)]


def check(kind: str, with_dots: bool, choose: Choice) -> None:
    device, host = tables(torch.randn(9, 5), choose)
    assert (device.tier, host.tier) == ("device", "host")
    wanted, found = (learn(table, kind, with_dots) for table in (device, host))
    assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
    assert host.statistics() == device.statistics()


@pytest.mark.parametrize("kind", MOMENTS)
def test_host_memory_trains_like_device_memory_bit_for_bit(kind):
    # only copies are interpreted here: the other operations are the CPU's
    check(kind, True, orders()[2])


@pytest.mark.slow
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("kind", MOMENTS)
def test_the_kernels_train_host_memory_like_device_memory_bit_for_bit(kind):
    check(kind, kind == "fp32", orders()[2])


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="host memory needs a GPU that reads it, not cpu"):
        trained_host_table(torch.zeros(4, 2), CPU)
    with pytest.raises(ValueError, match="table: expected contiguous float32"):
        tables(torch.zeros(4, 2).half(), orders()[0])
