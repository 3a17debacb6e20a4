"""Tests of the ingress without a cluster; test_with_ray.py runs it in one."""

import asyncio

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # it imports Ray


def sent(scope, *events):
    """The messages that the application behind Ray's proxy sends."""
    from server.replicas.ingress import _for_ray

    found, incoming = [], list(events)

    async def app(scope, receive, send):
        headers = [(b"x-request-id", b"1"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def receive():
        return incoming.pop(0)

    async def send(message):
        found.append(message)

    asyncio.run(_for_ray(app)(scope, receive, send))
    return found


def test_a_websocket_is_refused_without_an_error():
    assert sent({"type": "websocket"}) == [{"type": "websocket.close"}]


def test_the_proxy_adds_the_id_of_a_request():
    (start,) = sent({"type": "http"})
    assert start["headers"] == [(b"content-length", b"0")]


def test_the_start_and_end_are_answered():
    events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    kinds = [message["type"] for message in sent({"type": "lifespan"}, *events)]
    assert kinds == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
