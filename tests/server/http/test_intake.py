"""The intake of requests, in process: places, bodies within limits, and HEAD."""

import asyncio
import json

import pytest

from server.http.head_requests import HeadRequests
from server.http.intake import MAX_NESTING, Intake, place_of
from tests.server.http.test_admission import Desk

MANY = b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1)


class Application:
    """Records the bodies and places that it gets."""

    def __init__(self):
        self.bodies, self.places = [], []

    async def __call__(self, scope, receive, send):
        self.places.append(place_of(scope))
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["method"].encode()})


class Client:
    """Sends requests whose bodies arrive as the messages that a test gives."""

    def __init__(self, timeout_s=60.0):
        self.desk, self.app = Desk(), Application()
        paths = frozenset({"/generate"})
        intake = Intake(self.app, self.desk.admission, paths, 900, timeout_s)
        self.stack = HeadRequests(intake)

    async def send(
        self, *parts, ends=True, headers=(), path="/generate", method="POST", root_path=""
    ):
        self.sent = sent = []
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if ends:
            messages.append({"type": "http.request", "body": b""})

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
        scope["root_path"] = root_path
        await self.stack(scope, receive, send)
        error = sent[1]["body"] if sent[0]["status"] != 200 else b"{}"
        return sent[0]["status"], json.loads(error).get("error", {}).get("message", "")


def run(scenario, timeout_s=60.0):
    client = Client(timeout_s)
    asyncio.run(asyncio.wait_for(scenario(client), 30))
    assert not any(client.desk.admission.used.values())
    return client


def test_a_body_is_passed_on_and_holds_its_bytes_until_the_answer():
    async def scenario(client):
        used = client.desk.admission.used
        inner = client.app.__call__

        async def look(scope, receive, send):
            assert used == {"prompts": 1, "tokens": 0, "body_bytes": 5}
            await inner(scope, receive, send)

        client.stack._app._app = look
        assert await client.send(b"he", b"llo") == (200, "")

    assert run(scenario).app.bodies == [b"hello"]


def test_only_generating_requests_take_places():
    async def scenario(client):
        other = client.desk.place("other", prompts=4)
        other.keep()
        assert (await client.send(b"a"))[0] == 503
        assert (await client.send(b"a", path="/tokenize"))[0] == 200
        assert (await client.send(method="GET"))[0] == 200
        other.close()

    assert run(scenario).desk.rejected == ["queue_full"]


def test_the_root_path_is_no_part_of_a_generating_path():
    async def scenario(client):
        client.desk.place("other", prompts=4).keep()
        for root in ("/proxy", "/gen", "/generate/x", ""):  # proxies may strip it
            assert (await client.send(b"a", root_path=root))[0] == 503
        assert (await client.send(b"a", path="/proxy/generate", root_path="/proxy"))[0] == 503
        assert (await client.send(b"a", path="/generate", root_path="/generate"))[0] == 200
        client.desk.admission.give_back("prompts", 4)

    run(scenario)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
@pytest.mark.parametrize(
    "header", [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")], ids=["length", "te"]
)
def test_only_post_may_have_a_body(method, header):
    async def scenario(client):
        client.desk.place("full", body_bytes=1000).keep()
        status, message = await client.send(b"a", headers=[header], method=method, path="/")
        assert status == 413 and message == "only POST requests may have a body"
        length = [(b"content-length", b"0")]
        assert (await client.send(headers=length, method=method))[0] == 200
        client.desk.admission.give_back("body_bytes", 1000)

    assert not run(scenario).desk.rejected


def test_a_refused_request_whose_answer_is_unread_is_not_evicted():
    async def scenario(client):
        refused = []

        async def receive():
            return {"type": "http.request", "body": b"a" * 901}

        async def send(message):
            client.desk.now += 1.0
            refused.append(await client.send(b"a"))  # others go on meanwhile

        client.desk.place("other", prompts=3).keep()
        scope = {"type": "http", "path": "/generate", "method": "POST", "headers": []}
        await client.stack(scope, receive, send)
        assert refused == [(200, ""), (200, "")]
        client.desk.admission.give_back("prompts", 3)

    run(scenario)


@pytest.mark.parametrize(
    ("parts", "headers", "status"),
    [
        ([b"a" * 900], [], 200),
        ([b"a" * 901], [], 413),
        ([b"a" * 500, b"a" * 500], [], 413),
        ([], [(b"content-length", b"901")], 413),
        ([], [(b"content-length", b"9" * 4000)], 413),
        ([b"a"], [(b"content-encoding", b"identity")], 200),
        ([b"a"], [(b"content-encoding", b"gzip")], 415),
        ([MANY], [], 400),
        ([MANY[1:-1]], [], 200),
        ([b'"' + MANY + b'\\"' + MANY + b'"'], [], 200),
        ([b'"' + b'\\"' * 400 + b"[" * 65], [], 200),
    ],
)
def test_bodies_beyond_limits_are_refused(parts, headers, status):
    async def scenario(client):
        assert (await client.send(*parts, headers=headers))[0] == status

    run(scenario)


def test_a_declared_body_takes_its_bytes_at_once():
    async def scenario(client):
        client.desk.place("other", body_bytes=200).keep()
        declared = [(b"content-length", b"801")]
        assert (await client.send(headers=declared))[0] == 503
        client.desk.admission.give_back("body_bytes", 200)

    assert run(scenario).desk.rejected == ["too_many_bytes"]


def test_a_body_that_stops_gets_408():
    async def scenario(client):
        status, message = await client.send(b"a", ends=False)
        assert status == 408 and "took too long" in message

    run(scenario, timeout_s=0.01)


def test_slow_bodies_lose_their_places_to_others():
    async def scenario(client):
        slow = [asyncio.create_task(client.send(b"a", ends=False)) for _ in range(4)]
        while client.desk.admission.used["body_bytes"] < 4:
            await asyncio.sleep(0)
        assert (await client.send(b"a"))[0] == 503
        client.desk.now = 1.0
        assert (await client.send(b"a"))[0] == 200
        assert (await slow[0])[0] == 408
        for task in slow[1:]:
            task.cancel()
        ends = await asyncio.gather(*slow[1:], return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)  # the gate answers
        assert not any(client.desk.admission.used.values())

    run(scenario)


def test_head_is_a_get():
    async def scenario(client):
        assert await client.send(method="HEAD") == (200, "")
        assert client.sent[1]["body"] == b"GET"  # the connection leaves it out

    run(scenario)
