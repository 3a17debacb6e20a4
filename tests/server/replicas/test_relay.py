"""Tests of the application that passes requests to replicas."""

import asyncio
import json

import pytest

from server.http.errors import ApiError, OverloadedError
from server.replicas.relay import Relay, ReplicaLostError

START = {"type": "http.response.start", "status": 200}
EVENTS = {**START, "headers": [(b"content-type", b"text/event-stream"), (b"x-request-id", b"1")]}
JSON = {**START, "headers": [(b"content-type", b"application/json")]}
PLAIN = {**START, "headers": [(b"content-type", b"text/plain")]}


def body(text, more=False):
    return {"type": "http.response.body", "body": text, "more_body": more}


class Replicas:
    """Answers each request by the next of its scripts: messages, and perhaps an error."""

    def __init__(self, *scripts, all_answers=None):
        self.scripts, self.all_answers, self.requests = list(scripts), all_answers, []

    async def stream(self, request):
        self.requests.append(request)
        for message in self.scripts.pop(0):
            if isinstance(message, Exception):
                raise message
            yield [message] if message else []

    async def answer_all(self, request):
        return self.all_answers


def exchanged(replicas, path="/v1/completions", method="POST", sent=b'{"prompt": "x"}'):
    """The status and the body of the response."""
    relay = Relay(replicas.stream, replicas.answer_all, frozenset({"/v1/completions"}))
    incoming = [{"type": "http.request", "body": sent}]
    found = []

    async def receive():
        return incoming.pop() if incoming else await asyncio.Event().wait()

    async def send(message):
        found.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
    asyncio.run(asyncio.wait_for(relay(scope, receive, send), 60))
    assert all(name != b"x-request-id" for name, _ in found[0]["headers"])
    return found[0]["status"], b"".join(message.get("body", b"") for message in found)


def error_message(text):
    return json.loads(text)["error"]["message"]


def test_a_response_passes_unchanged():
    replicas = Replicas([EVENTS, body(b"data: 1\n\n", more=True), body(b"data: [DONE]\n\n")])
    assert exchanged(replicas) == (200, b"data: 1\n\ndata: [DONE]\n\n")
    assert replicas.requests[0].body == b'{"prompt": "x"}'


def test_a_stream_of_a_replica_that_dies_ends_with_an_error_event():
    replicas = Replicas([EVENTS, body(b"data: 1\n\n", more=True), ReplicaLostError()])
    status, text = exchanged(replicas)
    first, error, done = text.decode().split("\n\n")[:3]
    assert (status, first, done) == (200, "data: 1", "data: [DONE]")
    assert error_message(error.removeprefix("data: ")) == "the replica has died"


def test_a_stream_of_a_replica_that_fails_ends_with_its_error():
    replicas = Replicas([EVENTS, body(b"data: 1\n\n", more=True), ApiError(500, "internal error")])
    error = exchanged(replicas)[1].decode().split("\n\n")[1]
    assert error_message(error.removeprefix("data: ")) == "internal error"


def test_a_response_that_has_not_begun_comes_from_another_replica():
    replicas = Replicas([ReplicaLostError()], [JSON, body(b"{}")])
    assert exchanged(replicas) == (200, b"{}")
    assert [request.is_retry for request in replicas.requests] == [False, True]


@pytest.mark.parametrize(
    "scripts",
    [([ReplicaLostError()], [ReplicaLostError()]), ([None, ReplicaLostError()],)],
    ids=["two replicas", "two engines of one replica"],
)
def test_a_request_is_retried_once_because_it_may_be_the_reason(scripts):
    status, text = exchanged(Replicas(*scripts))
    assert (status, error_message(text)) == (500, "the replica has died")


def test_a_change_of_the_patches_is_not_made_twice():
    replicas = Replicas([ReplicaLostError()])
    assert exchanged(replicas, "/v1/memory/patches")[0] == 500


def test_a_whole_response_is_not_spoilt_by_a_death_after_it():
    assert exchanged(Replicas([JSON, body(b"{}"), ReplicaLostError()])) == (200, b"{}")


def test_half_of_a_response_that_is_no_stream_is_cut_off():
    with pytest.raises(ConnectionError, match="in the middle of a response"):
        exchanged(Replicas([JSON, body(b"{", more=True), ReplicaLostError()]))


@pytest.mark.parametrize(
    ("error", "status"), [(OverloadedError(), 503), (ApiError(503, "no replica answers"), 503)]
)
def test_an_error_of_the_way_is_answered(error, status):
    assert exchanged(Replicas([error]))[0] == status


def test_metrics_come_from_all_replicas():
    texts = [
        (name, [PLAIN, body(f"# TYPE x gauge\nx {number}\n".encode())])
        for number, name in enumerate("ab")
    ]
    status, text = exchanged(Replicas(all_answers=texts), "/metrics", "GET")
    assert status == 200
    assert b'x{replica="a"} 0.0' in text and b'x{replica="b"} 1.0' in text


def test_a_refusal_of_metrics_passes():
    refused = [{**JSON, "status": 403}, body(b"{}")]
    assert exchanged(Replicas(all_answers=[("a", refused)]), "/metrics", "GET") == (403, b"{}")


@pytest.mark.parametrize("others", [[], [TimeoutError()], [("a", [PLAIN, body(b"")]), KeyError()]])
def test_metrics_without_those_of_a_replica_are_unavailable(others):
    status, text = exchanged(Replicas(all_answers=others), "/metrics", "GET")
    assert (status, error_message(text)) == (503, "no replica answers")


def test_a_client_that_leaves_ends_its_request():
    ended = []

    async def stream(request):
        try:
            yield [EVENTS]
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def run():
        incoming = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{}"}]

        async def receive():
            return incoming.pop()

        async def send(message):
            await asyncio.sleep(0)

        scope = {"type": "http", "method": "POST", "path": "/x", "root_path": "", "headers": []}
        await Relay(stream, None, frozenset())(scope, receive, send)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert ended == [True]
