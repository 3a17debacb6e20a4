"""Node 0's links to other nodes: one frame for all ranks of a node, and the loss of a node."""

import queue
import socket

import pytest

from engine.errors import ConfigError
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.message_codec import encoded
from engine.executors.parallel.messages import (
    MeetOthers,
    NodeAnswer,
    RankDied,
    RankMessage,
    RankReady,
    RankRefused,
)
from engine.executors.parallel.nodes import NodeLink, Nodes


@pytest.fixture
def cluster():
    """Nodes 1 and 2 with ranks 2 to 5, and the other ends of their channels."""
    pairs = [socket.socketpair() for _ in range(2)]
    links = [
        NodeLink(node, range(2 * node, 2 * node + 2), f"10.0.0.{node}", 5 * node, channel)
        for node, channel in enumerate((Channel(ours, NodeAnswer, 1000) for ours, _ in pairs), 1)
    ]
    ends = [Channel(theirs, RankMessage) for _, theirs in pairs]
    nodes = Nodes(links)
    yield nodes, ends
    nodes.close()
    for end in ends:
        end.close()


def numbers(end, count):
    """Ranks and ports of the next messages to a node."""
    found = []
    for _ in range(count):
        rank, frame = end.recv_frame()
        found.append((rank, frame.header))
    return found


def test_a_node_gets_one_frame_for_all_its_ranks(cluster):
    nodes, ends = cluster
    same, other = encoded(MeetOthers(1)), encoded(MeetOthers(2))
    nodes.send([same] * 4)
    nodes.send([same, other, same, same])
    nodes.send_to(5, other)
    assert numbers(ends[0], 3) == [(0, same.header), (2, same.header), (3, other.header)]
    assert numbers(ends[1], 3) == [(0, same.header), (0, same.header), (5, other.header)]
    assert nodes.num_blocks == 5


def test_all_nodes_must_have_loaded_their_ranks(cluster):
    nodes, ends = cluster
    for end in ends:
        end.send(RankReady())
    nodes.wait_until_ready()
    # node 1 still loads
    ends[1].send(RankRefused("model: too large"))
    with pytest.raises(ConfigError, match="node 2: model: too large"):
        nodes.wait_until_ready()
    ends[0].send(RankDied(2, 77, 1))
    with pytest.raises(RankLostError, match=r"node 1 at 10\.0\.0\.1 did not load its ranks"):
        nodes.wait_until_ready()
    ends[0].end()
    with pytest.raises(RankLostError, match=r"node 1 at 10\.0\.0\.1 has ended or cannot be"):
        nodes.wait_until_ready()


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (
            lambda end: end.send(RankDied(4, 77, -9)),
            "tensor-parallel rank 4 (process 77 of node 2 at 10.0.0.2) died (exit -9)",
        ),
        (
            lambda end: end.end(),
            "node 2 at 10.0.0.2 has ended or cannot be reached: the connection",
        ),
        (
            lambda end: end.send(RankRefused("x" * 2000)),
            "node 2 at 10.0.0.2 has ended or cannot be reached: a message of 20",
        ),
    ],
    ids=["rank", "node", "too-large"],
)
def test_the_loss_of_a_node_is_logged(cluster, caplog, act, line):
    nodes, ends = cluster
    losses = queue.SimpleQueue()
    nodes.watch(lambda: losses.put(None))
    act(ends[1])
    losses.get(timeout=30)
    assert line in caplog.text and "node 1" not in caplog.text


def test_what_cannot_be_sent_is_a_loss(cluster):
    nodes, ends = cluster
    ends[1].close()
    frame = encoded(MeetOthers(1))
    for call in (lambda: nodes.send([frame] * 4), lambda: nodes.send_to(4, frame)):
        with pytest.raises(RankLostError, match=r"node 2 at 10\.0\.0\.2 has ended or cannot be"):
            call()
    with pytest.raises(RankLostError):
        nodes.start(3)
    # the other one has got it
    assert numbers(ends[0], 1) == [(0, frame.header)]


def test_closing_is_no_loss(cluster, caplog):
    nodes, ends = cluster
    losses = queue.SimpleQueue()
    nodes.watch(lambda: losses.put(None))
    nodes.close()
    for end in ends:
        end.wait_for_end()
    with pytest.raises(queue.Empty):
        losses.get(timeout=0.1)
    assert not caplog.text
