"""SIGTERM under load: every request gets its whole answer or an error, and nothing stays."""

import asyncio
import signal

import pytest

from tests.server.running import Running, running
from tests.server.test_serve import children, ends
from tests.soak.drawn_requests import Choice, DrawnRequest
from tests.soak.load_client import LoadClient, Response, async_client, check_answer
from tests.soak.server_state import ServerState

pytestmark = pytest.mark.soak
NUM_SHORT, NUM_LONG = 48, 16
OPTIONS = ("--drain-timeout-s", "6", "--max-num-seqs", "32", "--kv-cache-gib", "0.5")
LONG = {"max_tokens": 3000, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
SHORT = LONG | {"max_tokens": 60}


def short_requests(server: Running) -> list[DrawnRequest]:
    """Short requests with the answers of the idle server."""
    requests = []
    for number in range(8):
        body = SHORT | {"prompt": [number] * 9}
        (choice,) = server.complete(**body).json()["choices"]
        expected = Choice(choice["text"], tuple(choice["token_ids"]), choice["finish_reason"])
        requests.append(DrawnRequest("/v1/completions", body, 9, expected))
    return requests


def with_stream(request: DrawnRequest, number: int) -> DrawnRequest:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    body = {**request.body, **(stream if number % 2 else {})}
    return DrawnRequest(request.path, body, request.num_prompt_tokens, request.expected)


def test_a_drain_that_ends_in_time_finishes_what_fits_and_tells_the_rest(slow_folder):
    with running(slow_folder, *OPTIONS) as server:
        state, pids = ServerState(server), children(server.process.pid)
        short = short_requests(server)
        long = DrawnRequest("/v1/completions", LONG | {"prompt": [1, 2, 3]}, 3)
        requests = [long] * NUM_LONG + [short[number % 8] for number in range(NUM_SHORT)]
        requests = [with_stream(request, number) for number, request in enumerate(requests)]

        def in_flight() -> float:
            return state.total("num_requests_running") + state.total("num_requests_waiting")

        def terminate() -> None:
            while in_flight() <= NUM_SHORT:
                pass
            server.process.send_signal(signal.SIGTERM)

        async def load() -> list[Response]:
            responses = [Response() for _ in requests]
            async with async_client(server.url) as http, asyncio.TaskGroup() as group:
                client = LoadClient(http)
                for request, response in zip(requests, responses, strict=True):
                    group.create_task(client.exchange(request, response))
                group.create_task(asyncio.to_thread(terminate))
            return responses

        whole = 0
        for request, response in zip(requests, asyncio.run(load()), strict=True):
            assert response.is_whole
            if response.error is None:
                check_answer(request, response)
                whole += 1
            else:
                assert "the server is shutting down" in response.error["message"]
                assert response.status == (200 if response.events else 503)
                assert response.events or response.retry_after
        print(f"\n{whole} of {len(requests)} requests were answered before the end")
        assert 0 < whole <= NUM_SHORT
        assert server.process.wait(timeout=60) == 0
        assert all(map(ends, pids))
        errors = server.process.stderr.read()
        assert "requests end with an error" in errors and "Traceback" not in errors
