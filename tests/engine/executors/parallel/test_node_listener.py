"""Nodes that join node 0 over TCP, and strangers that connect to its port."""

import logging
import queue
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from engine.errors import ConfigError
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.messages import JoinAnswer, JoinRefused, NodeJoin, StartRanks
from engine.executors.parallel.node_connection import connect
from engine.executors.parallel.node_handshake import HandshakeError, introduce
from engine.executors.parallel.node_listener import NodeListener

KEY = b"k" * 32
RANKS = {1: range(2, 4), 2: range(4, 6)}


def listening():
    """A listener on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    made = NodeListener("localhost", port)
    made.port = port
    return made


@pytest.fixture
def listener():
    made = listening()
    yield made
    made.close()


def joined(port, node, traits=None, num_blocks=None, key=KEY):
    """The channel of a node that has asked to join, by default with 100 blocks per number."""
    channel = Channel(connect("127.0.0.1", port, key, 10.0), JoinAnswer, 10_000)
    blocks = 100 * node if num_blocks is None else num_blocks
    channel.send(NodeJoin(node, traits or {}, blocks))
    return channel


def leaving(*arguments):
    """``joined``, closed at the end of a block."""
    return closing(joined(*arguments))


def gathering(threads, listener, ranks=RANKS, refusal=lambda join: None, timeout_s=30.0):
    return threads.submit(listener.gather, KEY, ranks, refusal, timeout_s)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as made:
        yield made


def test_nodes_join_in_any_order_and_nobody_after_them(threads, listener):
    found = gathering(threads, listener)
    second, first = joined(listener.port, 2), joined(listener.port, 1)
    nodes = found.result()
    assert nodes.num_blocks == 100
    nodes.start(90)
    assert first.recv() == second.recv() == StartRanks(90)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.port))
    nodes.close()
    for channel in (first, second):
        with pytest.raises(EOFError):
            channel.recv()
        channel.close()


STRANGERS = {
    "silent": b"",
    "garbage": bytes(range(256)) * 100,
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "without-key": b"memplus nodes 1\n" + bytes(64),
}


def test_strangers_do_not_stop_node_0(threads, listener, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("engine.executors.parallel.node_listener._GREETING_S", 0.5)
    found = gathering(threads, listener, {1: range(1, 2)})
    for sent in STRANGERS.values():
        with socket.create_connection(("127.0.0.1", listener.port), timeout=30) as stranger:
            stranger.sendall(sent)
            # the connection ends, after a challenge and at most a refusal
            received = b""
            try:
                while part := stranger.recv(1000):
                    received += part
            except ConnectionResetError:
                continue
            assert not received[48:].strip(b"\0") and len(received) <= 80
    with pytest.raises(HandshakeError, match="refused the node key"):
        joined(listener.port, 1, key=b"wrong key, wrong key")
    for prefix in (struct.pack("!IIQ", 0, 2**20, 0), struct.pack("!IIQ", 0, 7, 0) + b"garbage"):
        with socket.create_connection(("127.0.0.1", listener.port), timeout=30) as one:
            introduce(one, KEY, 5.0)
            one.sendall(prefix)
            assert one.recv(10) == b""
    with leaving(listener.port, 1) as channel, closing(found.result()) as nodes:
        nodes.start(5)
        assert channel.recv() == StartRanks(5)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(STRANGERS) + 3
    assert all("a connection from 127.0.0.1 to the port of the nodes failed" in e for e in lines)
    for reason in ("timed out", "no node of this version", "another node key", "is larger"):
        assert any(reason in line for line in lines), reason


def test_many_strangers_are_not_all_served(threads, monkeypatch):
    monkeypatch.setattr("engine.executors.parallel.node_listener._MOST_GREETINGS", 1)
    fewer = listening()
    found = gathering(threads, fewer, {1: range(1, 2)})
    address = "127.0.0.1", fewer.port
    with socket.create_connection(address) as first:
        assert len(first.recv(48)) == 48
        with socket.create_connection(address, timeout=30) as second:
            assert second.recv(48) == b""
    # the first one has left: a node gets its place
    channel = joined(address[1], 1)
    found.result().close()
    with pytest.raises(EOFError):
        channel.recv()
    channel.close()


@pytest.mark.parametrize(
    ("node", "traits", "num_blocks", "reason"),
    [
        (3, {}, 1, "node_rank: there is no node 3"),
        (0, {}, 1, "node_rank: there is no node 0"),
        (2, {}, 1, "node_rank: node 2 at 127.0.0.1 has joined already"),
        (1, {"config": "other"}, 1, "config: differs"),
        (1, {}, 0, "num_blocks: must be at least 1, not 0"),
    ],
)
def test_a_node_that_does_not_fit_learns_why(threads, listener, node, traits, num_blocks, reason):
    def refusal(join):
        return "config: differs" if join.traits else None

    found = gathering(threads, listener, refusal=refusal)
    with leaving(listener.port, 2) as second:
        with leaving(listener.port, node, traits, num_blocks) as channel:
            assert channel.recv() == JoinRefused(reason)
        with leaving(listener.port, 1) as first, closing(found.result()) as nodes:
            nodes.start(7)
            assert first.recv() == second.recv() == StartRanks(7)


def test_a_node_that_leaves_may_come_again(threads, listener, caplog):
    found = gathering(threads, listener)
    joined(listener.port, 1).close()
    again, other = leaving(listener.port, 1), leaving(listener.port, 2)
    with again as first, other as second, closing(found.result()) as nodes:
        nodes.start(7)
        assert first.recv() == second.recv() == StartRanks(7)
    assert "node 1 at 127.0.0.1 has left before the start" in caplog.text


def test_the_last_node_to_join_may_have_left(threads, listener, caplog):
    arrived = queue.SimpleQueue()

    def refusal(join):
        if not join.traits:
            # the node has asked to join, and ends before it gets the answer
            arrived.get(timeout=30).close()

    found = gathering(threads, listener, {1: range(1, 2)}, refusal)
    arrived.put(joined(listener.port, 1))
    with leaving(listener.port, 1, {"again": "yes"}) as node, closing(found.result()) as nodes:
        nodes.start(7)
        assert node.recv() == StartRanks(7)
    assert "node 1 at 127.0.0.1 has left before the start" in caplog.text


def test_a_process_without_further_threads_closes_connections(threads, listener, monkeypatch):
    found = gathering(threads, listener, {1: range(1, 2)})
    with monkeypatch.context() as patch:

        def start(thread):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", start)
        for _ in range(70):  # more than may greet together: their places are free again
            with socket.create_connection(("127.0.0.1", listener.port), timeout=30) as one:
                assert one.recv(48) == b""
    channel = joined(listener.port, 1)
    found.result().close()
    channel.close()
    assert not listener._arrivals.qsize() and listener._num_refused == 0


def test_nodes_that_do_not_come_are_named(threads, listener):
    found = gathering(threads, listener, timeout_s=0.1)
    with pytest.raises(RankLostError, match=r"no node 1, 2 joined within 0\.1 s"):
        found.result()


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "cannot listen on 192.0.2.1 port"),
        ("0.0.0.0", "must be an address that the other nodes can reach, not 0.0.0.0"),
        ("::", "must be an address that the other nodes can reach, not ::"),
        ("no-such-host.invalid", "cannot listen on no-such-host.invalid port"),
        ("a" * 70, "cannot listen on aaa"),
    ],
)
def test_addresses_of_other_machines_are_refused(host, reason):
    with pytest.raises(ConfigError, match=f"^master_addr: .*{reason}"):
        NodeListener(host, 29500)


def test_a_taken_port_is_refused(listener):
    with pytest.raises(ConfigError, match="master_addr: node 0 cannot listen on .*in use"):
        NodeListener("127.0.0.1", listener.port)


def test_a_node_waits_until_node_0_listens(threads, listener):
    port = listener.port
    listener.close()
    waiting = threads.submit(connect, "127.0.0.1", port, KEY, 30.0)
    later = NodeListener("127.0.0.1", port)
    found = gathering(threads, later, {1: range(1, 2)})
    with waiting.result() as connection:
        Channel(connection, JoinAnswer).send(NodeJoin(1, {}, 1))
        found.result().close()
        assert connection.recv(1) == b""


def test_a_node_gives_up_if_nobody_listens(listener):
    listener.close()
    with pytest.raises(TimeoutError, match="no answer from node 0 at 127.0.0.1 port"):
        connect("127.0.0.1", listener.port, KEY, 0.1)
