"""Start and end of the real server: readiness, draining, second signals; and a failing step."""

import signal
import socket
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from tests.server.faulty_serve import FAULTY_ID
from tests.server.running import Running, running, serve_command
from tests.server.test_serve import children, ends

# enough KV blocks for all requests of a test
KV = ("--kv-cache-gib", "0.5")
LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True}
SHORT = {"prompt": "x", "max_tokens": 30, "ignore_eos": True}


class Stream:
    """A stream whose first event has arrived, and the rest of its events in a thread."""

    def __init__(self, pool: ThreadPoolExecutor, server: Running, body: dict) -> None:
        self._begun: Future[None] = Future()
        self._events = pool.submit(self._read, server, body)
        self._begun.result(timeout=60)

    def events(self) -> list[str]:
        """All events, when the stream has ended."""
        return self._events.result(timeout=60)

    def _read(self, server: Running, body: dict) -> list[str]:
        events = []
        options = {"json": body | {"stream": True}, "timeout": 60}
        with httpx.stream("POST", f"{server.url}/v1/completions", **options) as response:
            for line in response.iter_lines():
                events += [line] if line else []
                if not self._begun.done():
                    self._begun.set_result(None)
        return events


def test_a_draining_server_finishes_what_it_can_and_tells_the_others(slow_folder):
    with (
        running(slow_folder, "--drain-timeout-s", "600", *KV) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        pids = children(server.process.pid)
        long = [Stream(pool, server, LONG) for _ in range(2)]
        whole = [pool.submit(server.complete, **LONG) for _ in range(2)]
        while server.metric("memplus:num_requests_running") < 4:
            pass
        short = [Stream(pool, server, SHORT) for _ in range(2)]
        server.process.send_signal(signal.SIGTERM)
        while (refused := httpx.get(f"{server.url}/ready")).is_success:
            pass
        refused = httpx.post(f"{server.url}/v1/completions", json=SHORT)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] and refused.headers["connection"] == "close"
        assert httpx.get(f"{server.url}/health").status_code == 200
        for stream in short:
            assert len(stream.events()) == 31 and stream.events()[-1] == "data: [DONE]"
        # the others would take minutes
        server.process.send_signal(signal.SIGTERM)
        for stream in long:
            *_, error, done = stream.events()
            assert "the server is shutting down" in error and done == "data: [DONE]"
        for answer in (one.result(timeout=60) for one in whole):
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert "shutting down" in answer.json()["error"]["message"]
        assert server.process.wait(timeout=60) == 0
        assert all(map(ends, pids))
        errors = server.process.stderr.read()
        assert "Traceback" not in errors and "requests are running" in errors


@pytest.mark.slow
def test_with_timeout_0_the_server_ends_within_2_s_under_load(slow_folder):
    options = ("--drain-timeout-s", "0", *KV)
    with running(slow_folder, *options) as server, ThreadPoolExecutor(32) as pool:
        pids = children(server.process.pid)
        streams = [Stream(pool, server, LONG) for _ in range(16)]
        whole = [pool.submit(server.complete, **LONG) for _ in range(8)]
        while server.metric("memplus:num_requests_running") < 24:
            pass
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        # 2 s, and as much again for a busy machine
        assert time.monotonic() - start < 4
        assert all("shutting down" in stream.events()[-2] for stream in streams)
        assert {answer.result().status_code for answer in whole} == {503}
        assert all(map(ends, pids))


@pytest.mark.slow
def test_a_client_that_reads_nothing_does_not_keep_the_server(slow_folder):
    body = b'{"prompt": "x", "n": 64, "max_tokens": 3000, "ignore_eos": true, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with running(slow_folder, "--drain-timeout-s", "0") as server:
        with socket.create_connection(server.address) as deaf:
            deaf.sendall(head + body)
            while not server.metric("memplus:num_requests_running"):
                pass
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=60) == 0
        assert "Traceback" not in server.process.stderr.read()


@pytest.mark.slow
def test_a_server_that_loads_is_alive_and_not_ready(memory_plus_folder, tmp_path):
    path = tmp_path / "socket"
    command = serve_command(memory_plus_folder, "--uds", str(path))
    transport = httpx.HTTPTransport(uds=str(path))
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as http,
    ):
        try:
            # the server listens before it says so
            assert any(line.startswith("loading") for line in process.stderr)
            statuses = []
            while not statuses or statuses[-1] != 200:
                answer = http.get("/ready")
                statuses.append(answer.status_code)
                assert http.get("/health").status_code == 200
                if answer.status_code == 503:
                    assert answer.headers["retry-after"]
                    assert answer.json()["error"]["message"] == "the model is loading"
            assert statuses[0] == 503 and set(statuses) == {503, 200}
            assert http.post("/v1/completions", json=SHORT).status_code == 200
        finally:
            process.terminate()
            process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_failing_step_fails_only_the_requests_in_it(memory_plus_folder):
    greedy = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    # neither the prompts nor the answers of the others may have the faulty token
    greedy["logit_bias"] = {str(FAULTY_ID): -100}
    with running(memory_plus_folder, program="tests.server.faulty_serve") as server:
        alone = [server.complete(prompt=[i] * 9, **greedy).json()["choices"] for i in range(6)]
        with ThreadPoolExecutor(12) as pool:
            good = [pool.submit(server.complete, prompt=[i] * 9, **greedy) for i in range(6)]
            bad = [pool.submit(server.complete, prompt=[8, FAULTY_ID], **greedy) for _ in range(6)]
            for answer in (one.result() for one in bad):
                assert answer.status_code == 500
                request_id = answer.headers["x-request-id"]
                message = f"ArithmeticError in the engine (request {request_id})"
                assert answer.json()["error"]["message"] == message
            assert [one.result().json()["choices"] for one in good] == alone
        assert server.http.get("/ready").status_code == 200
        assert server.complete(prompt=[1] * 9, **greedy).json()["choices"] == alone[1]
        assert server.metric("memplus:kv_cache_usage_perc") == 0
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
