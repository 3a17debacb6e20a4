"""Parsing of streamed responses, split anywhere, complete or faulty."""

import pytest

from benchmarks.completion_stream import CompletionStream, Usage
from benchmarks.http_answer import HttpResponse, ResponseError
from tests.benchmarks.stub_server import STREAM_HEAD, chunked, event, events

EVENTS = events(prompt_tokens=7, generated_tokens=3, cached_tokens=2)
USAGE = Usage(prompt_tokens=7, generated_tokens=3, cached_tokens=2)


def read(pieces: list[bytes]) -> CompletionStream:
    """Feed the pieces; piece n arrives at time n."""
    stream = CompletionStream()
    for now, piece in enumerate(pieces):
        assert not stream.is_complete
        stream.feed(piece, float(now))
    return stream


def split(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def test_a_token_s_time_is_the_arrival_of_its_complete_event():
    stream = read([STREAM_HEAD, *(chunked([part])[: -len(b"0\r\n\r\n")] for part in EVENTS)])
    assert not stream.is_complete
    stream.feed(b"0\r\n\r\n", 9.0)
    assert stream.is_complete and stream.keeps_connection
    assert stream.token_times == [1.0, 2.0, 3.0]
    assert stream.usage() == USAGE


def test_a_response_may_be_split_anywhere():
    whole = STREAM_HEAD + chunked(EVENTS)
    for at in range(1, len(whole)):
        stream = read([whole[:at], whole[at:]])
        assert stream.is_complete and stream.usage() == USAGE
        assert len(stream.token_times) == 3
    for size in (1, 2, 3, 7):
        stream = read(split(whole, size))
        assert stream.is_complete and stream.usage() == USAGE
        assert len(stream.token_times) == 3


@pytest.mark.parametrize("size", [1, 5, 40, 10_000])
def test_chunks_may_split_events_anywhere(size):
    whole = STREAM_HEAD + chunked(split(b"".join(EVENTS), size))
    stream = read(split(whole, 3))
    assert stream.is_complete and stream.usage() == USAGE
    assert len(stream.token_times) == 3


def test_other_valid_spellings_are_parsed():
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
    stream = read(split(head + body, 10))
    assert stream.is_complete and stream.keeps_connection and stream.usage() == USAGE


def test_a_body_may_end_with_the_connection():
    stream = read([b"HTTP/1.1 200 OK\r\n\r\n", b"".join(EVENTS)])
    assert not stream.is_complete
    stream.feed_end()
    assert stream.is_complete and not stream.keeps_connection
    assert stream.usage() == USAGE


@pytest.mark.parametrize("head", [STREAM_HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
def test_a_truncated_body_is_not_complete(head):
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
def test_the_connection_header_decides_on_reuse(line, keeps):
    http = HttpResponse()
    assert http.feed(line + b"\r\nContent-Length: 0\r\n\r\n") == b""
    assert http.is_complete and http.keeps_connection == keeps


def test_an_error_status_is_reported_with_the_start_of_its_body():
    body = b'{"error": {"message": "no such model"}}' + b" " * 1000
    stream = read([b"HTTP/1.1 404 Not Found\r\nContent-Length: 1039\r\n\r\n", *split(body, 11)])
    assert stream.is_complete
    with pytest.raises(ResponseError, match='^HTTP 404: {"error": {"message": "no such model"}}$'):
        stream.usage()


@pytest.mark.parametrize(
    "last", [event({"choices": [{"text": "x"}], "usage": None}), event([]), b"data: {\n\n", b""]
)
def test_a_response_without_usage_is_an_error(last):
    stream = read([STREAM_HEAD + chunked([last, b"data: [DONE]\n\n"])])
    assert stream.is_complete
    with pytest.raises(ResponseError, match="the last event has no usage"):
        stream.usage()


def test_an_error_event_within_a_stream_is_reported():
    failed = event({"error": {"message": "the engine failed"}})
    stream = read([STREAM_HEAD + chunked([EVENTS[0], failed, b"data: [DONE]\n\n"])])
    with pytest.raises(ResponseError, match="the engine failed"):
        stream.usage()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not an HTTP/1.1 response"),
        (b"HTTP/1.1 OK\r\n\r\n", "not an HTTP/1.1 response"),
        (STREAM_HEAD + b"data: x\r\n", "not a chunk size"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**17, "HTTP head is longer than 65536 bytes"),
    ],
)
def test_bytes_that_are_not_http_are_rejected(data, message):
    with pytest.raises(ResponseError, match=message):
        CompletionStream().feed(data, 0.0)
