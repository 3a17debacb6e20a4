"""Tests of requests that travel to a replica."""

import asyncio
import json
import pickle

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from server.api_keys import parse_key
from server.http.authentication import KEY_IN_SCOPE, key_of
from server.replicas.relayed_request import RelayedRequest, response_messages, routing_text
from server.request_id import CURRENT_ID

INTERVAL = "server.replicas.relayed_request._INTERVAL_S"
GENERATING = frozenset({"/v1/completions"})


def scope(path="/v1/completions", **changes):
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [(b"x-request-id", b"theirs"), (b"accept", b"*/*")],
        "state": object(),
    } | changes


def request_of(path="/v1/completions", body=b'{"prompt": "x"}', **changes):
    return RelayedRequest.of(scope(path, **changes), body, GENERATING)


def collected(app, request):
    async def run():
        return [message async for batch in response_messages(app, request) for message in batch]

    return asyncio.run(run())


def test_only_plain_values_travel_and_the_key_is_one_of_them():
    key = parse_key("secret name admin", "test")
    token = CURRENT_ID.set("ours")
    request = pickle.loads(pickle.dumps(request_of(**{KEY_IN_SCOPE: key})))
    CURRENT_ID.reset(token)
    assert "state" not in request.scope
    assert request.scope["headers"] == [(b"accept", b"*/*"), (b"x-request-id", b"ours")]
    assert key_of(request.scope) == key


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"prompt": "a b"}, "a b"),
        ({"prompt": ["a", "b"]}, "a"),
        ({"prompt": [3, 4, 5]}, "3 4 5"),
        ({"prompt": [[3, 4], [5]]}, "3 4"),
        ({"messages": [{"role": "user"}]}, '[null, [{"role": "user"}]]'),
    ],
)
def test_a_prompt_of_any_kind_routes(body, prompt):
    assert routing_text(json.dumps(body).encode()).prompt == prompt


def test_patches_and_salts_separate_prompts():
    bodies = [
        {"prompt": "x"} | more for more in ({}, {"memory_patches": ["a"]}, {"cache_salt": "s"})
    ]
    scopes = {routing_text(json.dumps(body).encode()).scope for body in bodies}
    assert len(scopes) == 3


@pytest.mark.parametrize(
    "large",
    [
        {"prompt": "x" * 10**6},
        {"prompt": [7] * 10**6},
        {"prompt": [["x" * 10**6]]},
        {"prompt": "x", "cache_salt": "s" * 10**6},
        {"messages": [{"content": "x" * 10**6}], "model": ["m" * 10**6]},
    ],
)
def test_the_routing_text_of_a_large_body_is_small(large):
    text = routing_text(json.dumps(large).encode())
    assert 0 < len(text.prompt) <= 65536 and len(text.scope) == 32


def nested(depth):
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1]", b"\xff", b'{"prompt": {}}', b'{"prompt": []}'),
        b'{"prompt":' + b"[" * 10**5,
        *(b'{"prompt":' + nested(depth) + b"}" for depth in (20, 900, 10**5)),
        b'{"messages":' + nested(10**5) + b"}",
        b'{"prompt": "x", "model":' + nested(10**5) + b"}",
    ],
    ids=lambda body: f"{body[:16]!r}-{len(body)}",
)
def test_a_body_without_a_prompt_is_left_to_the_replica(body):
    assert routing_text(body) is None


def test_only_paths_with_prompts_are_read():
    assert request_of("/tokenize").text is None
    assert request_of().text is not None


def test_the_application_gets_the_request():
    async def app(scope, receive, send):
        request = Request(scope, receive)
        found = {"path": request.url.path, "body": await request.json()}
        await JSONResponse(found)(scope, receive, send)

    start, body = collected(app, request_of())
    assert start["status"] == 200
    assert json.loads(body["body"]) == {"path": "/v1/completions", "body": {"prompt": "x"}}


def test_events_of_a_fast_stream_arrive_together_and_the_first_one_at_once(monkeypatch):
    """The pause between two lists outlasts the test, so only its end lets the rest arrive."""
    monkeypatch.setattr(INTERVAL, 600)
    released = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0)
        for text in (b"first ", b"second ", b"third "):
            await send({"type": "http.response.body", "body": text, "more_body": True})
            await asyncio.sleep(0)
        await released.wait()
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    async def run():
        found = []
        async for batch in response_messages(app, request_of()):
            found.append([message.get("body") for message in batch])
            if any(body and body.startswith(b"first") for body in found[-1]):
                released.set()
        return found

    bodies = asyncio.run(asyncio.wait_for(run(), 60))
    assert bodies[0] == [None] and bodies[1][0].startswith(b"first ")
    assert b"".join(body for batch in bodies[1:] for body in batch) == b"first second third end"
    assert len(bodies) == 3


def test_a_reader_that_stops_disconnects_the_client():
    seen = []

    async def endless():
        while True:
            yield b"x"
            await asyncio.sleep(0)

    async def app(scope, receive, send):
        try:
            await StreamingResponse(endless())(scope, receive, send)
        finally:
            seen.append("ended")

    async def run():
        batches = response_messages(app, request_of())
        await anext(batches)
        await batches.aclose()

    asyncio.run(run())
    assert seen == ["ended"]


def test_an_error_of_the_application_reaches_the_reader():
    async def app(scope, receive, send):
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        collected(app, request_of())


def test_an_error_after_the_response_is_not_raised_again():
    async def app(scope, receive, send):
        await JSONResponse({}, 500)(scope, receive, send)
        raise KeyError("logged already")

    assert [message["type"] for message in collected(app, request_of())][-1] == "http.response.body"
