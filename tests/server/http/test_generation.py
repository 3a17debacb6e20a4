"""Shares of the limits, deadlines and cancellation: with a fake engine, then a real server."""

import asyncio
import json
import socket

import pytest

from engine.messages import Abort
from engine.request import Request, TokenOutput
from engine.sampling.params import TokenLogprobs
from tests.models import byte_tokenizer
from tests.server.http.test_app import answer, build, ended, post
from tests.server.running import running


async def never():
    await asyncio.Event().wait()


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


def events(sent):
    data = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return [part.removeprefix("data: ") for part in data.split("\n\n") if part]


def test_an_answer_that_ended_gives_its_share_back_though_nobody_reads_it():
    process, service, app = build()
    used = service.admission.used

    async def scenario():
        body = {"prompt": "abc", "n": 2, "max_tokens": 7, "stream": True}
        call = asyncio.create_task(post(app, body, never))
        await until(lambda: process.sent)
        assert (used["prompts"], used["tokens"]) == (2, 2 * (3 + 7))
        # nothing awaits here, so nothing can read
        for request, left in zip(process.sent[:2], (1, 0), strict=True):
            answer(service, TokenOutput(request.request_id, (65,), "length"))
            assert (used["prompts"], used["tokens"]) == (left, left * 10)
        assert used["body_bytes"] > 0
        await call
        assert used["body_bytes"] == 0

    asyncio.run(scenario())


def test_samples_reach_the_engine_in_one_message_with_one_prompt():
    process, _, app = build()
    calls = []
    process.send = lambda *messages: calls.append(messages)

    async def leave():
        await until(lambda: calls)

    asyncio.run(post(app, {"prompt": "abc", "n": 2}, leave))
    first, second = calls[0]
    assert first.prompt_ids is second.prompt_ids


# an answer that starts arrives well before the longer deadline
@pytest.mark.parametrize(("started", "timeout"), [(False, 0.01), (True, 0.5)])
@pytest.mark.parametrize("asked", [True, False])
def test_a_deadline_ends_a_request_with_504_or_an_error_event(asked, started, timeout):
    process, service, app = build(request_timeout_s=0.0 if asked else timeout)

    def send(*messages):
        process.sent += messages
        if started and isinstance(messages[0], Request):
            answer(service, TokenOutput(messages[0].request_id, (65,)))

    process.send = send

    async def scenario():
        sent = []
        body = {"prompt": "a", "stream": True, "max_tokens": 9}
        body |= {"timeout": timeout} if asked else {}
        await post(app, body, never, sent)
        return sent

    sent = asyncio.run(scenario())
    if started:
        first, error, done = events(sent)
        assert json.loads(first)["choices"] and done == "[DONE]" and sent[0]["status"] == 200
    else:
        (error,) = events(sent)
        assert sent[0]["status"] == 504
    assert json.loads(error)["error"]["type"] == "timeout_error"
    assert f"longer than {timeout} s" in json.loads(error)["error"]["message"]
    # on a busy machine the shorter deadline may pass before the request is sent
    assert process.sent[1:] == [Abort(one.request_id) for one in process.sent[:1]]
    assert process.sent or not started
    assert not any(service.admission.used.values()) and ended(service) == {"abort": 1}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_nan_is_an_error_and_never_json(streamed):
    process, service, app = build()

    async def scenario():
        body = {"prompt": "a", "stream": streamed, "logprobs": 0}
        sent = []
        call = asyncio.create_task(post(app, body, never, sent))
        await until(lambda: process.sent)
        for number, reason in ((-1.0, None), (float("nan"), "length")):
            entry = TokenLogprobs(65, number, 1, ())
            name = process.sent[0].request_id
            answer(service, TokenOutput(name, (65,), reason, logprobs=(entry,)))
        await call
        return sent

    sent = asyncio.run(scenario())
    assert not any(b"NaN" in message.get("body", b"") for message in sent)
    error = json.loads(events(sent)[-2 if streamed else 0])["error"]
    assert "not finite" in error["message"] and sent[0]["status"] == (200 if streamed else 500)


@pytest.mark.parametrize("streamed", [False, True])
def test_outputs_that_arrive_with_a_stop_string_and_after_it_are_dropped(streamed):
    process, service, app = build()

    def send(*messages):
        process.sent += messages
        if isinstance(messages[0], Request):
            for token_id in byte_tokenizer().encode("abcd").ids:
                answer(service, TokenOutput(messages[0].request_id, (token_id,)))

    process.send = send
    body = {"prompt": "x", "stop": "c", "stream": streamed, "max_tokens": 9}
    text = ""
    for event in events(asyncio.run(post(app, body, never))):
        if event != "[DONE]":
            text += json.loads(event)["choices"][0]["text"]
    assert text == "ab"
    assert process.sent[1:] == [Abort(process.sent[0].request_id)]
    assert not any(service.admission.used.values()) and ended(service) == {"stop": 1}


@pytest.mark.parametrize(("allowed", "priority", "status"), [(0, 1, 400), (0, 0, 200), (1, 1, 200)])
def test_priority_needs_permission(allowed, priority, status):
    process, service, app = build(allow_priority=bool(allowed))

    async def finish():
        await until(lambda: process.sent)
        answer(service, TokenOutput(process.sent[0].request_id, (65,), "length"))
        await never()

    sent = asyncio.run(post(app, {"prompt": "a", "priority": priority}, finish))
    assert sent[0]["status"] == status
    if status == 400:
        assert json.loads(sent[1]["body"])["error"]["param"] == "priority"


def idle(server):
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return not any(server.metric(f"memplus:{gauge}") for gauge in gauges)


def ask(server, **body):
    """Send a completion request on a socket, and read nothing."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client = socket.create_connection(server.address)
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return client


def test_streams_that_nobody_reads_do_not_lock_an_idle_engine(memory_server):
    greedy = {"prompt": "x", "n": 64, "max_tokens": 60, "ignore_eos": True, "stream": True}
    clients = [ask(memory_server, **greedy) for _ in range(5)]
    while memory_server.complete(prompt="x", max_tokens=1, n=64).status_code == 503:
        pass
    while not idle(memory_server):
        pass
    # all places are free, though the clients are still connected and have read nothing
    assert memory_server.complete(prompt=["x"] * 320, max_tokens=1).status_code == 200
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def slow_server(slow_folder):
    options = ("--max-num-seqs", "1", "--max-queued-requests", "3")
    options += ("--max-admitted-tokens", "16000", "--body-timeout-s", "1000")
    with running(slow_folder, *options) as server:
        yield server


@pytest.mark.parametrize("streamed", [False, True])
def test_running_and_queued_requests_of_clients_that_leave_are_ended(slow_server, streamed):
    body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": streamed}
    clients = [ask(slow_server, **body) for _ in range(3)]
    while slow_server.metric("memplus:num_requests_waiting") < 2:
        pass
    assert slow_server.metric("memplus:num_requests_running") == 1
    for client in clients:
        client.close()
    while not idle(slow_server):
        pass
    assert slow_server.complete(prompt=["x"] * 4, max_tokens=1).status_code == 200


def test_a_deadline_ends_running_and_queued_requests(slow_server):
    body = {"prompt": ["x", "x"], "max_tokens": 3000, "ignore_eos": True, "timeout": 0.3}
    whole = slow_server.complete(**body)
    assert whole.status_code == 504 and whole.json()["error"]["type"] == "timeout_error"
    with slow_server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as one:
        streamed = one.read()
    assert b"timeout_error" in streamed
    while not idle(slow_server):
        pass
    assert slow_server.complete(prompt=["x"] * 4, max_tokens=1).status_code == 200


def test_slow_bodies_do_not_lock_the_server(slow_server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n{"
    clients = [socket.create_connection(slow_server.address) for _ in range(8)]
    for client in clients:
        client.sendall(head)
    # the slow ones lose their places long before the body timeout
    while (answer := slow_server.complete(prompt="x", max_tokens=1)).status_code == 503:
        pass
    assert answer.status_code == 200
    for client in clients:
        client.close()
    while slow_server.complete(prompt=["x"] * 4, max_tokens=1).status_code == 503:
        pass
