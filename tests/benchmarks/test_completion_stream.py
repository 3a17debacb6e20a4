"""Answers read from their bytes: whatever way they are cut, and whatever is wrong with them."""

import pytest

from benchmarks.completion_stream import CompletionStream, Usage
from benchmarks.http_answer import AnswerError, HttpAnswer
from tests.benchmarks.stub_server import STREAM_HEAD, chunked, event, events

EVENTS = events(prompt_tokens=7, generated_tokens=3, cached_tokens=2)
USAGE = Usage(prompt_tokens=7, generated_tokens=3, cached_tokens=2)


def read(pieces: list[bytes]) -> CompletionStream:
    """Feed the pieces; the n-th comes at time n."""
    stream = CompletionStream()
    for now, piece in enumerate(pieces):
        assert not stream.is_complete
        stream.feed(piece, float(now))
    return stream


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def test_each_token_has_the_time_at_which_its_event_was_whole():
    stream = read([STREAM_HEAD, *(chunked([part])[: -len(b"0\r\n\r\n")] for part in EVENTS)])
    assert not stream.is_complete
    stream.feed(b"0\r\n\r\n", 9.0)
    assert stream.is_complete and stream.keeps_connection
    assert stream.token_times == [1.0, 2.0, 3.0]
    assert stream.usage() == USAGE


def test_an_answer_may_be_cut_anywhere():
    whole = STREAM_HEAD + chunked(EVENTS)
    for at in range(1, len(whole)):
        stream = read([whole[:at], whole[at:]])
        assert stream.is_complete and stream.usage() == USAGE
        assert len(stream.token_times) == 3
    for size in (1, 2, 3, 7):
        stream = read(cut(whole, size))
        assert stream.is_complete and stream.usage() == USAGE
        assert len(stream.token_times) == 3


@pytest.mark.parametrize("size", [1, 5, 40, 10_000])
def test_chunks_may_cut_events_anywhere(size):
    whole = STREAM_HEAD + chunked(cut(b"".join(EVENTS), size))
    stream = read(cut(whole, 3))
    assert stream.is_complete and stream.usage() == USAGE
    assert len(stream.token_times) == 3


def test_other_ways_of_writing_the_same_are_read():
    lines = b": hello\r\nevent: x\r\n" + b"".join(EVENTS).replace(b"\n", b"\r\n")
    lines = lines.replace(b"data: ", b"data:").replace(b'"choices": []', b'"choices":[]')
    head = STREAM_HEAD.replace(b"Transfer-Encoding: chunked", b"transfer-encoding:Chunked")
    trailers = b"5;x=y\r\nTEXT!\r\n0\r\nA: b\r\n\r\n"
    stream = read([head + chunked([lines])[: -len(b"0\r\n\r\n")] + trailers])
    assert stream.is_complete and stream.usage() == USAGE
    assert len(stream.token_times) == 3


def test_a_body_may_have_a_length():
    body = b"".join(EVENTS)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    stream = read(cut(head + body, 10))
    assert stream.is_complete and stream.keeps_connection and stream.usage() == USAGE


def test_a_body_may_end_with_the_connection():
    stream = read([b"HTTP/1.1 200 OK\r\n\r\n", b"".join(EVENTS)])
    assert not stream.is_complete
    stream.feed_end()
    assert stream.is_complete and not stream.keeps_connection
    assert stream.usage() == USAGE


@pytest.mark.parametrize("head", [STREAM_HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
def test_a_body_that_was_cut_off_is_not_complete(head):
    stream = read([head + b"4\r\nx"])
    stream.feed_end()
    assert not stream.is_complete


@pytest.mark.parametrize(
    ("line", "keeps"),
    [
        (b"HTTP/1.1 200 OK", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close", False),
        (b"HTTP/1.0 200 OK", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive", True),
    ],
)
def test_what_the_server_says_of_the_connection_holds(line, keeps):
    http = HttpAnswer()
    assert http.feed(line + b"\r\nContent-Length: 0\r\n\r\n") == b""
    assert http.is_complete and http.keeps_connection == keeps


def test_a_refusal_is_told_with_its_beginning():
    body = b'{"error": {"message": "no such model"}}' + b" " * 1000
    stream = read([b"HTTP/1.1 404 Not Found\r\nContent-Length: 1039\r\n\r\n", *cut(body, 11)])
    assert stream.is_complete
    with pytest.raises(AnswerError, match='^HTTP 404: {"error": {"message": "no such model"}}$'):
        stream.usage()


@pytest.mark.parametrize(
    "last", [event({"choices": [{"text": "x"}], "usage": None}), event([]), b"data: {\n\n", b""]
)
def test_an_answer_without_usage_is_none(last):
    stream = read([STREAM_HEAD + chunked([last, b"data: [DONE]\n\n"])])
    assert stream.is_complete
    with pytest.raises(AnswerError, match="the last event has no usage"):
        stream.usage()


def test_an_error_within_a_stream_is_told():
    failed = event({"error": {"message": "the engine failed"}})
    stream = read([STREAM_HEAD + chunked([EVENTS[0], failed, b"data: [DONE]\n\n"])])
    with pytest.raises(AnswerError, match="the engine failed"):
        stream.usage()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1.1 answer"),
        (b"HTTP/1.1 OK\r\n\r\n", "no HTTP/1.1 answer"),
        (STREAM_HEAD + b"data: x\r\n", "no size of a chunk"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**17, "head without an end"),
    ],
)
def test_what_is_no_http_is_refused(data, message):
    with pytest.raises(AnswerError, match=message):
        CompletionStream().feed(data, 0.0)
