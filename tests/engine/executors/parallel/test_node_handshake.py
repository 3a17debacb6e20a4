"""The proof of the node key: both ends, and what strangers send."""

import hmac
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.executors.parallel.node_handshake import (
    HandshakeError,
    WrongKeyError,
    introduce,
    welcome,
)

KEY, OTHER = b"k" * 32, b"o" * 32
GREETING = b"memplus nodes 1\n"


@pytest.fixture
def ends():
    """The two ends of a connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def both(ends, masters, nodes):
    """The errors of node 0 and of the node, each with its key; None without error."""

    def run(side, connection, key):
        try:
            side(connection, key, 5.0)
        except WrongKeyError as error:
            connection.close()
            return str(error)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, welcome, ends[0], masters)
        second = threads.submit(run, introduce, ends[1], nodes)
        return first.result(), second.result()


def test_ends_with_the_same_key_agree(ends):
    assert both(ends, KEY, KEY) == (None, None)
    ends[0].sendall(b"next")
    assert ends[1].recv(100) == b"next"


def test_another_key_is_refused_on_both_ends(ends):
    assert both(ends, KEY, OTHER) == ("it has another node key", "it refused the node key")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "no node of this version"),
        (bytes(1000), "no node of this version"),
        (GREETING + bytes(64), "another node key"),
        (GREETING + bytes(10), "closed the connection"),
        (b"", "closed the connection"),
    ],
)
def test_a_stranger_gets_a_challenge_and_a_refusal_at_most(ends, sent, reason):
    ends[1].sendall(sent)
    ends[1].shutdown(socket.SHUT_WR)
    with pytest.raises(HandshakeError, match=reason):
        welcome(ends[0], KEY, 5.0)
    ends[0].close()
    try:
        got = ends[1].recv(1000)
    except ConnectionResetError:  # node 0 left some of it unread
        got = b""
    assert len(got) in (0, 48) or (len(got) == 80 and got[48:] == bytes(32))


def test_a_silent_stranger_ends_with_the_time(ends):
    with pytest.raises(TimeoutError):
        welcome(ends[0], KEY, 0.05)


def test_a_proof_cannot_be_sent_back(ends):
    """A stranger that sends node 0 its own challenge back has no proof for the node's role."""
    ours, theirs = ends
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(welcome, ours, KEY, 5.0)
        challenge = theirs.recv(48)[16:]
        # what the owner of the key would answer as node 0
        masters = hmac.digest(KEY, GREETING + b"master\n" + challenge + challenge, "sha256")
        theirs.sendall(GREETING + challenge + masters)
        with pytest.raises(WrongKeyError, match="another node key"):
            found.result()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", EOFError),
        (b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(100), HandshakeError),
        (GREETING + bytes(32) + b"x" * 32, WrongKeyError),
        (GREETING + bytes(64), WrongKeyError),
        # it ended or was killed: the node tries again
        (GREETING + bytes(32), EOFError),
        (GREETING + bytes(40), EOFError),
    ],
)
def test_a_node_refuses_what_is_not_node_0(ends, sent, error):
    ends[0].sendall(sent)
    ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(error) as refusal:
        introduce(ends[1], KEY, 5.0)
    assert refusal.type is error
