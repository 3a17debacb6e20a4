"""Processes of ranks: which one is reported as dead, and what they are sent."""

import contextlib
import queue

import pytest

from engine.executors.parallel import ranks as ranks_module
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.message_codec import MessageError, encoded
from engine.executors.parallel.messages import MeetOthers, RankDied
from engine.executors.parallel.ranks import AFTER_ANOTHER, Ranks
from tests.server.test_serve import ends

pytestmark = pytest.mark.slow
ENTRY = "tests.engine.executors.parallel.rank_entry:main"


@contextlib.contextmanager
def watched(**options):
    """Three ranks of which this process is rank 0, and a queue of the deaths."""
    with contextlib.closing(Ranks(ENTRY, 3, None, **options)) as ranks:
        ranks.wait_until_ready()
        deaths = queue.SimpleQueue()
        ranks.watch(lambda: deaths.put(ranks.died))
        yield ranks, deaths


def codes(deaths, caplog):
    """Numbers and exit codes of two ranks that die."""
    for _ in range(2):
        deaths.get(timeout=60)
    return {(record.args[0], record.args[2]) for record in caplog.records}


def test_the_rank_that_ended_first_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(ranks_module, "_REPORT_S", 300.0)
    with watched() as (ranks, deaths):
        first, second = (process.pid for process in ranks._processes)
        # this one ends because the other one did, but its end is noticed before
        ranks.send_to(2, MeetOthers(AFTER_ANOTHER))
        assert ends(second)
        ranks.send_to(1, MeetOthers(9))
        assert deaths.get(timeout=60) == RankDied(1, first, 9)
    assert [record.getMessage() for record in caplog.records] == [
        f"tensor-parallel rank 1 (process {first}) died (exit 9)"
    ]


def test_messages_reach_their_ranks_and_no_dead_one(caplog):
    with watched() as (ranks, deaths):
        ranks.send([MeetOthers(11), MeetOthers(12)])
        assert codes(deaths, caplog) == {(1, 11), (2, 12)}
        for call in (
            lambda: ranks.send([MeetOthers(1)] * 2),
            lambda: ranks.send_to(1, MeetOthers(1)),
            lambda: ranks.pass_on(2, encoded(MeetOthers(1))),
        ):
            with pytest.raises(RankLostError, match="tensor-parallel rank [12] has died"):
                call()


def test_a_node_passes_a_frame_on_to_each_of_its_ranks(caplog):
    with watched(started=range(4, 6)) as (ranks, deaths):
        with pytest.raises(MessageError, match="for rank 1, which this machine does not have"):
            ranks.pass_on(1, encoded(MeetOthers(7)))
        ranks.pass_on(0, encoded(MeetOthers(7)))
        assert codes(deaths, caplog) == {(4, 7), (5, 7)}
