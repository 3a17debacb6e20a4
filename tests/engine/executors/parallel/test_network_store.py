"""Ranks that meet over the network: collectives, and a store that is closed afterwards."""

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import pytest
import torch

from engine.executors.parallel.group import RankGroup, RankLostError
from engine.executors.parallel.network_store import NetworkPlace, NetworkStore

# each plays a machine
ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def test_ranks_of_several_addresses_sum_to_the_same_bits():
    parts = torch.randn(3, 5, 18)

    def work(rank):
        group = RankGroup(rank, 3)
        group.meet_over_network(NetworkPlace(ADDRESSES[0], ADDRESSES[rank]), store.port)
        x = parts[rank]
        # neither is sent through memory that ranks share
        assert group._memory is None
        return group.sum(x.clone()), group.gather_columns(x), group.exchange_columns(x)

    with ThreadPoolExecutor(3) as threads, closing(NetworkStore(ADDRESSES[0])) as store:
        results = list(threads.map(work, range(3)))
    for rank, (total, gathered, own) in enumerate(results):
        torch.testing.assert_close(total, parts.sum(0))
        assert torch.equal(total, results[0][0])
        assert torch.equal(gathered, torch.cat(list(parts), dim=1))
        torch.testing.assert_close(own, parts.sum(0)[:, 6 * rank : 6 * (rank + 1)])


def test_a_store_listens_at_its_address_until_it_is_closed():
    store = NetworkStore("127.0.0.2")
    socket.create_connection(("127.0.0.2", store.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", store.port))
    store.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port))


def test_a_rank_that_others_cannot_reach_ends_the_meeting_soon(monkeypatch):
    """It has come to the store, but its connections to other ranks carry nothing."""
    monkeypatch.setattr("engine.executors.parallel.group.MEETING_TIMEOUT", timedelta(seconds=1))
    place = NetworkPlace("127.0.0.1", "127.0.0.1")
    with ThreadPoolExecutor(1) as threads, closing(NetworkStore("127.0.0.1")) as store:
        silent = RankGroup(1, 2)
        limit = timedelta(seconds=1)
        joined = threads.submit(lambda: silent._join(place.store(store.port), place.own, limit))
        # not the 10 minutes of later collectives
        with pytest.raises(RankLostError, match="1000ms"):
            RankGroup(0, 2).meet_over_network(place, store.port)
        joined.result()


def test_collectives_have_more_time_than_the_meeting():
    place = NetworkPlace("127.0.0.1", "127.0.0.1")

    def timeout(rank):
        group = RankGroup(rank, 2)
        group.meet_over_network(place, store.port)
        return group._group.options._timeout

    with ThreadPoolExecutor(2) as threads, closing(NetworkStore("127.0.0.1")) as store:
        assert list(threads.map(timeout, range(2))) == [timedelta(minutes=10)] * 2


def test_a_rank_that_cannot_reach_the_store_says_so(monkeypatch):
    store = NetworkStore("127.0.0.1")
    store.close()
    monkeypatch.setattr(
        "engine.executors.parallel.network_store.MEETING_TIMEOUT", timedelta(seconds=1)
    )
    with pytest.raises(RankLostError, match="exchange between tensor-parallel ranks failed"):
        RankGroup(1, 2).meet_over_network(NetworkPlace("127.0.0.1", "127.0.0.1"), store.port)
