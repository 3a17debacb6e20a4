"""Framed messages over a socket: sizes, ends and time limits."""

import socket
import struct
import threading

import numpy as np
import pytest

from engine.executors.parallel.channel import Channel
from engine.executors.parallel.message_codec import MessageError
from engine.executors.parallel.messages import AddPatch, RankMessage, RankRefused, StartRanks


@pytest.fixture
def ends():
    """The two ends of a connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def patch(num_bytes):
    """A message with an array of this size."""
    return AddPatch(1, "hash", {0: 0}, [(np.arange(3), np.ones(num_bytes, np.uint8), "x")], ())


@pytest.mark.parametrize("num_bytes", [0, 5, 2**16, 2**20 + 3])
def test_messages_of_any_size_arrive_in_order(ends, num_bytes):
    sender, receiver = Channel(ends[0], RankMessage), Channel(ends[1], RankMessage | StartRanks)
    # a socket holds less than the largest
    thread = threading.Thread(target=lambda: [sender.send(patch(num_bytes)), sender.send(START)])
    thread.start()
    (rows, deltas, dtype), *others = receiver.recv().tables
    assert (rows.tolist(), deltas.sum(), dtype, others) == ([0, 1, 2], num_bytes, "x", [])
    assert receiver.recv() == START
    thread.join()


START = StartRanks(12)


def test_a_frame_is_passed_on_unread(ends):
    sender, middle = Channel(ends[0], RankMessage), Channel(ends[1], RankMessage)
    sender.send(patch(100))
    rank, frame = middle.recv_frame()
    assert rank == 0
    middle.send_frame(frame, 7)
    rank, again = sender.recv_frame()
    assert rank == 7 and again.header == frame.header
    assert np.array_equal(again.parts[0], frame.parts[0])


def test_a_message_that_is_too_large_is_refused_before_it_is_read(ends):
    sender, receiver = Channel(ends[0], StartRanks), Channel(ends[1], RankRefused, 1000)
    sender.send(RankRefused("x" * 900))
    assert receiver.recv() == RankRefused("x" * 900)
    sender.send(RankRefused("x" * 1000))
    with pytest.raises(MessageError, match=r"of 10\d\d bytes is larger"):
        receiver.recv()


@pytest.mark.parametrize("sizes", [(2**32 - 1, 0), (10, 2**63), (2**25, 0)])
def test_a_size_is_checked_before_memory_is_reserved(ends, sizes):
    ends[0].sendall(struct.pack("!IIQ", 0, *sizes))
    with pytest.raises(MessageError, match="is larger"):
        Channel(ends[1], StartRanks, 2**20).recv()


@pytest.mark.parametrize("sent", [b"", b"\0\0\0", struct.pack("!IIQ", 0, 9, 0) + b"four"])
def test_a_connection_that_ends_in_a_message_is_an_end(ends, sent):
    ends[0].sendall(sent)
    ends[0].close()
    with pytest.raises(EOFError):
        Channel(ends[1], StartRanks).recv()


def test_the_time_of_all_reads_together_is_limited(ends):
    channel = Channel(ends[1], StartRanks, 100)
    channel.limit_time(0.05)
    ends[0].sendall(b"\0")
    with pytest.raises(TimeoutError):
        channel.recv()


def test_bytes_that_have_arrived_do_not_extend_the_time(ends):
    channel = Channel(ends[1], StartRanks, 100)
    Channel(ends[0], StartRanks).send(START)
    channel.limit_time(0.0)
    with pytest.raises(TimeoutError):
        channel.recv()


def test_the_end_is_noticed_though_messages_are_unread(ends):
    sender, receiver = Channel(ends[0], StartRanks), Channel(ends[1], StartRanks)
    sender.send(START)
    sender.end()
    receiver.wait_for_end()
    assert receiver.recv() == START
    with pytest.raises(EOFError):
        receiver.recv()
    sender.end()
    receiver.close()
