"""Graph replays of the host table: the order of replays, lookups and hints on fake streams."""

import pytest
import torch

from tests.memory_ops.fake_streams import FakeDevice
from tests.memory_ops.interpreted.test_host_table import orders, plain_table

REPLAYED = 7
BRANCHES = (3, 4)


def uses_of_the_cache(give) -> list[list[int]]:
    """For each order of the streams, the row ids in the order in which the cache got them."""
    found = []
    for choose in orders(0, 1, 2, *BRANCHES)[::3]:
        device = FakeDevice()
        table, reads = plain_table(device)
        device.run(lambda ready: ready[0])
        used: list[int] = []
        reads._note = lambda rows, operand, used=used: used.append(int(rows.flatten()[0]))
        give(device, table)
        device.run(choose)
        found.append(used)
    return found


def start(table, row: int):
    return table.start(torch.full((1, 1, 1), row), torch.ones(1, 1, 1))


def graph_of(device, table):
    return device.capture(lambda: start(table, REPLAYED).finish())


def by_another_caller(device, give) -> None:
    own, device.caller = device.caller, device.another_caller()
    give()
    device.caller = own


GIVEN = {
    "hint": lambda device, table: table.hint(torch.tensor([1])),
    "unfinished": lambda device, table: start(table, 1),
    "another's": lambda device, table: by_another_caller(device, lambda: start(table, 1).finish()),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("is_joined", [True, False])
def test_a_replay_follows_only_joined_work(given, is_joined):
    def give(device, table):
        graph = graph_of(device, table)
        GIVEN[given](device, table)
        if is_joined:
            table.join()
        device.replay(graph, BRANCHES[0])

    assert all(used == [1, REPLAYED] for used in uses_of_the_cache(give)) == is_joined


@pytest.mark.parametrize("is_same", [True, False])
def test_work_after_a_replay_follows_it_on_the_same_stream_only(is_same):
    def give(device, table):
        device.replay(graph_of(device, table), BRANCHES[0])
        if is_same:
            start(table, 1).finish()
        else:
            by_another_caller(device, lambda: start(table, 1).finish())

    assert all(used == [REPLAYED, 1] for used in uses_of_the_cache(give)) == is_same


@pytest.mark.parametrize("is_same", [True, False])
def test_replays_run_in_order_on_one_stream_only(is_same):
    def give(device, table):
        first = graph_of(device, table)
        second = device.capture(lambda: start(table, 1).finish())
        device.replay(first, BRANCHES[0])
        if is_same:
            device.replay(second, BRANCHES[1])
        else:
            by_another_caller(device, lambda: device.replay(second, BRANCHES[1]))

    assert all(used == [REPLAYED, 1] for used in uses_of_the_cache(give)) == is_same
