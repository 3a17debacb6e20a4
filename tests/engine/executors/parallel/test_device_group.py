"""The collectives of ranks on GPUs, over gloo, and the nccl group as torch makes it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from engine.executors.parallel import device_group
from engine.executors.parallel.device_group import DeviceGroup, nccl_group
from engine.executors.parallel.group import RankLostError

CPU = torch.device("cpu")


def gloo_group(store, rank, size, timeout):
    """The group of ``nccl_group`` on CPUs."""
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return distributed.ProcessGroupGloo(store, rank, size, options)


def run_ranks(size, folder, work):
    """Call ``work`` with each rank's group, at the same time; the results in the order of ranks."""

    def run(rank):
        group = DeviceGroup(rank, size, gloo_group)
        group.meet(folder / "store", CPU)
        return work(group)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_equal_plain_operations(size, tmp_path):
    parts = torch.randn(size, 5, 6 * size)

    def work(group):
        x, first = parts[group.rank], torch.full((3,), float(group.rank))
        group.copy_from_first(first)
        least = group.smallest(torch.tensor([7 - group.rank]))
        columns = group.gather_columns(x), group.exchange_columns(x)
        return group.sum(x.clone()), *columns, first, least

    for rank, (total, gathered, own, first, least) in enumerate(run_ranks(size, tmp_path, work)):
        torch.testing.assert_close(total, parts.sum(0))
        assert torch.equal(gathered, torch.cat(list(parts), dim=1))
        torch.testing.assert_close(own, parts.sum(0)[:, 6 * rank : 6 * (rank + 1)])
        assert first.tolist() == [0.0] * 3 and least.item() == 8 - size


def test_a_rank_whose_partner_has_left_gets_an_error(tmp_path):
    def work(group):
        if group.rank == 1:
            group.leave()
            return
        with pytest.raises(RankLostError, match="an exchange between tensor-parallel ranks failed"):
            # some sums may still succeed from what was sent before
            for _ in range(100):
                group.sum(torch.ones(2))

    assert run_ranks(2, tmp_path, work) == [None, None]


class GraphGroup:
    """Ends, like nccl, when the last graph that has captured its collectives is freed."""

    def __init__(self):
        self.begun, self.freed, self.ended = (threading.Event() for _ in range(3))

    def abort(self):
        self.begun.set()
        self.freed.wait(30)
        self.ended.set()

    def allreduce(self, *arguments):
        return SimpleNamespace(wait=lambda: None)


def joined(group, folder):
    """A rank of this group."""
    rank = DeviceGroup(0, 1, lambda *arguments: group)
    rank.meet(folder / "store", CPU)
    return rank


def test_a_rank_that_leaves_frees_its_graphs_while_nccl_ends(tmp_path):
    group = GraphGroup()

    def free():
        # a graph in flight waits for a rank that has died, until nccl ends it
        assert group.begun.wait(30) and not group.ended.is_set()
        group.freed.set()

    joined(group, tmp_path).leave(free)
    assert group.ended.is_set()


def test_a_rank_does_not_wait_for_a_graph_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(device_group, "_LEAVING_S", 0.0)
    group = GraphGroup()
    joined(group, tmp_path).leave()
    assert not group.ended.is_set()
    group.freed.set()
    assert group.ended.wait(30)


def test_an_error_has_the_reason_that_nccl_gives_last(tmp_path):
    group = GraphGroup()
    rank = joined(group, tmp_path)

    def fail(*arguments):
        raise RuntimeError(
            "NCCL error in: a.cpp:1, unhandled system error\nLast error:\nNo space left on device\n"
            "Exception raised from check at a.cpp:1 (most recent call first):\nframe #0: main"
        )

    group.allreduce = fail
    with pytest.raises(RankLostError, match=r"error Last error: No space left on device$"):
        rank.sum(torch.ones(1))


def test_the_nccl_group_is_made_with_a_timeout(monkeypatch):
    made = []

    class FakeNccl:
        Options = SimpleNamespace

        def __init__(self, store, rank, size, options):
            made.append((store, rank, size, options._timeout))

    monkeypatch.setattr(distributed, "ProcessGroupNCCL", FakeNccl, raising=False)
    nccl_group("store", 1, 2, timedelta(minutes=3))
    assert made == [("store", 1, 2, timedelta(minutes=3))]
