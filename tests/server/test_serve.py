"""``memplus serve`` as processes: shutdown, restarts, limits, and errors at start."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.server.running import running


def children(pid: int) -> list[int]:
    found: list[int] = []
    # /proc lists a child under the thread that started it, and a thread may end meanwhile
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, task.read_text().split())
    return found


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def ends(pid: int) -> bool:
    """Whether a process ends, or becomes a zombie, within 30 s."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_processes_cleanly(memory_plus_folder, number):
    with running(memory_plus_folder) as server:
        pids = children(server.process.pid)
        assert server.complete(prompt="x", max_tokens=2).status_code == 200
        server.process.send_signal(number)
        assert server.process.wait(timeout=60) == 0
        assert all(map(ends, pids))
        assert "Traceback" not in server.process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_running_stream_is_finished_before_the_end(memory_plus_folder, number):
    # far more than the stream takes, even on a busy machine
    options = ("--drain-timeout-s", "600")
    with running(memory_plus_folder, *options, new_group=True) as server:
        body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            # to every process of the group, like a terminal or a supervisor
            os.killpg(server.process.pid, number)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        usage = json.loads(events[-2].removeprefix("data: "))["usage"]
        assert usage["completion_tokens"] == 300
        assert server.process.wait(timeout=60) == 0
        assert "Traceback" not in server.process.stderr.read()


@pytest.mark.slow
def test_streams_that_outlast_the_shutdown_timeout_end_with_an_error(slow_folder):
    with running(slow_folder, "--drain-timeout-s", "0") as server:
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-2] and rest[-1] == "data: [DONE]"
        assert server.process.wait(timeout=60) == 0
        assert "Traceback" not in server.process.stderr.read()


@pytest.mark.slow
def test_an_incomplete_body_times_out(memory_plus_folder):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with running(memory_plus_folder, "--body-timeout-s", "1") as server:
        with socket.create_connection(server.address) as slow:
            slow.sendall(head)
            assert b" 408 " in slow.recv(65536)
        assert server.complete(prompt="x").status_code == 200


def test_a_signal_while_the_model_loads_ends_the_command(memory_plus_folder):
    command = [sys.executable, "-m", "server.cli.main", "serve"]
    command += ["--model", str(memory_plus_folder)]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("threads: ")
        assert process.stderr.readline().startswith("loading")
        while not (pids := children(process.pid)):
            pass
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert all(map(ends, pids))


def test_only_the_engine_process_loads_torch(memory_server):
    pid = memory_server.process.pid
    assert "libtorch" not in maps(pid)
    assert any("libtorch" in maps(child) for child in children(pid))


LOST = "memplus: the engine process has died and no restarts are left (--engine-restarts)"


def test_a_dead_engine_ends_its_requests_with_errors_and_then_the_server(slow_folder):
    with running(slow_folder) as server:
        assert server.http.get("/health").status_code == 200
        engine = engine_of(server)
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(engine, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-2] and rest[-1] == "data: [DONE]"
        assert server.process.wait(timeout=60) == 1
        errors = server.process.stderr.read()
        assert LOST in errors.splitlines() and "Traceback" not in errors


def test_a_full_queue_is_a_503_with_retry_after(slow_folder):
    options = ("--max-num-seqs", "1", "--max-queued-requests", "1")
    with running(slow_folder, *options) as server:
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # a reference, since dropping it would close the stream
            next(lines)
            answer = server.complete(prompt=["a", "b"])
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "overloaded_error"
        # a request larger than the queue is a client error: retrying cannot help
        answer = server.complete(prompt=["a", "b", "c"])
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
        rejections = server.http.get("/metrics").text
        assert (
            'memplus:admission_rejections_total{model_name="slow",reason="queue_full"} 1.0'
            in rejections
        )
        while server.metric("memplus:num_requests_running"):
            pass
        assert server.complete(prompt=["a", "b"], max_tokens=2).status_code == 200


def test_a_body_beyond_the_limit_is_a_413(memory_plus_folder):
    with running(memory_plus_folder, "--max-body-mib", "1") as server:
        large = {"prompt": "x" * 2**20}
        assert server.complete(**large).status_code == 413
        headers = {"Content-Type": "application/json"}
        chunks = (b"x" * 2**18 for _ in range(8))
        answer = server.http.post("/v1/completions", content=chunks, headers=headers)
        assert answer.status_code == 413 and answer.json()["error"]["message"]
        assert server.complete(prompt="x").status_code == 200


def memplus(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_a_damaged_model_ends_the_command_with_one_line(memory_plus_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(memory_plus_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    result = memplus("serve", "--model", str(folder), "--port", "0")
    assert result.returncode == 2
    errors = [
        line
        for line in result.stderr.splitlines()
        if not line.startswith(("threads", "loading", "INFO"))
    ]
    assert errors == [f"memplus: {folder}: tensor model.norm.weight is missing"]


MISTAKES = [
    (["serve", "--model", "nowhere"], "nowhere"),
    (["serve", "--port", "99999"], "--port: "),
    (["serve", "--host", "203.0.113.1"], "host"),
    (["serve", "--kv-cache-gib", "inf"], "--kv-cache-gib: "),
    (["serve", "--kv-cache-gib", "1e9"], "--kv-cache-gib: "),
    (["generate", "\udcff"], "TEXT: "),
    (["serve", "--block-size", "0"], "--block-size: "),
    (["serve", "--engine-restarts", "-1"], "--engine-restarts: "),
    (["serve", "--stall-timeout-s", "0.5"], "--stall-timeout-s: "),
    (["generate", "x", "--temperature", "-1"], "--temperature: "),
    (["inspect", "nowhere"], "nowhere"),
    (["convert", "nowhere.gguf", "there"], "nowhere.gguf"),
    (["quantize", "nowhere", "there", "--table-dtype", "int8"], "nowhere"),
    (["quantize", "wordnet", "there"], "--table-dtype, --weight-dtype: give one or both"),
    (["serve", "--table-tier", "host"], "--table-tier: host needs a GPU"),
    (["serve", "--table-dtype", "int3"], "--table-dtype"),
    (["serve", "--log-interval-s", "-1"], "--log-interval-s: "),
    (["serve", "--max-connections", "2000000000"], "--max-connections: 2000000000 need"),
    (["serve", "--model", "model.gguf"], "model.gguf: is truncated or not a GGUF file"),
    (["serve", "--dtype", "int3"], "--dtype"),
    (["serve", "--novel"], "--novel"),
    (["serve", "--config", "nowhere.toml"], "nowhere.toml: No such file"),
    (["serve", "--api-key-file", "nowhere"], "--api-key-file: nowhere: No such file"),
    (["serve", "--tls-cert", "nowhere"], "--tls-cert: nowhere: No such file"),
    (["serve", "--uds", "/nowhere/socket"], "--uds: /nowhere/socket: No such file"),
    (["serve", "--uds", "socket", "--port", "8000"], "--uds: replaces --host and --port"),
    (["serve", "--uds", "socket", "--config", "host.toml"], "--uds: replaces --host and --port"),
]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if n % 4 else [])
        for n, case in enumerate(MISTAKES)
    ],
)
def test_a_command_line_error_is_one_line_and_exit_code_2(tmp_path, arguments, named):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "host.toml").write_text('host = "127.0.0.1"')
    arguments = [str(tmp_path / a) if (tmp_path / a).is_file() else a for a in arguments]
    result = memplus(*arguments)
    assert result.returncode == 2 and named in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_generate_prints_the_answer_of_the_server(memory_plus_folder, memory_server):
    model = ["--model", str(memory_plus_folder), "--max-tokens", "12", "--temperature", "0"]
    result = memplus("generate", "hello", *model)
    answer = memory_server.complete(prompt="hello", max_tokens=12, temperature=0).json()
    assert result.stdout == answer["choices"][0]["text"] + "\n"


def test_inspect_prints_counts(memory_plus_folder):
    result = memplus("inspect", str(memory_plus_folder))
    assert result.returncode == 0 and "2 dense, 2 memory_plus" in result.stdout


def engine_of(server) -> int:
    (engine,) = [child for child in children(server.process.pid) if "libtorch" in maps(child)]
    return engine


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_dead_or_hung_engine_is_replaced_under_load(slow_folder, number):
    with running(slow_folder, "--engine-restarts", "1") as server:
        first = engine_of(server)
        body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True}
        with ThreadPoolExecutor(8) as pool:
            open_requests = [pool.submit(server.complete, **body) for _ in range(8)]
            while not server.metric("memplus:num_requests_running"):
                pass
            os.kill(first, number)
            answers = [request.result() for request in open_requests]
        # every request was answered: with an error, or it had finished before
        assert {answer.status_code for answer in answers} <= {200, 500, 503}
        assert {answer.status_code for answer in answers} != {200}
        while server.http.get("/ready").status_code != 200:
            assert server.http.get("/health").status_code == 200
        assert engine_of(server) != first
        assert server.complete(prompt="x", max_tokens=2).status_code == 200
        # no restart is left for the next one
        os.kill(engine_of(server), signal.SIGKILL)
        assert server.process.wait(timeout=60) == 1
        assert LOST in server.process.stderr.read().splitlines()


@pytest.mark.slow
def test_500_requests_with_a_third_cancelled_leak_nothing(memory_plus_folder):
    drawn = random.Random(5)
    options = ("--max-num-seqs", "16", "--max-queued-requests", "600")
    with running(memory_plus_folder, *options) as server:

        async def one(client: httpx.AsyncClient, number: int) -> int:
            body = {
                "prompt": [drawn.randrange(256) for _ in range(drawn.randrange(1, 60))],
                "max_tokens": drawn.randrange(1, 30),
                "stream": number % 2 == 0,
                "ignore_eos": True,
            }
            call = asyncio.create_task(client.post("/v1/completions", json=body))
            if number % 3 == 0:
                await asyncio.wait([call], timeout=drawn.random())
                call.cancel()
                return 0
            return (await call).status_code

        async def all_of_them() -> list[int]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
                return await asyncio.gather(*(one(client, number) for number in range(500)))

        codes = asyncio.run(all_of_them())
        assert set(codes) == {0, 200} and codes.count(200) == 333
        while server.metric("memplus:num_requests_running"):
            pass
        for gauge in ("num_requests_waiting", "kv_cache_usage_perc"):
            assert server.metric(f"memplus:{gauge}") == 0
        # all places in the queue are free
        assert server.complete(prompt=["x"] * 616, max_tokens=1).status_code == 200


@pytest.mark.slow
def test_messages_larger_than_the_pipe_pass_in_both_directions(memory_plus_folder):
    with running(memory_plus_folder, "--max-admitted-tokens", "200000") as server:
        # more than 1 MB to the engine in one batch of requests
        many = server.complete(prompt=[[7] * 500] * 300, max_tokens=1)
        assert many.status_code == 200 and len(many.json()["choices"]) == 300
        # more than 1 MB back
        scores = {"prompt": [7] * 500, "n": 16, "max_tokens": 1, "prompt_logprobs": 20}
        answer = server.complete(**scores)
        assert answer.status_code == 200
        assert [len(c["prompt_logprobs"]) for c in answer.json()["choices"]] == [500] * 16
        assert server.http.get("/health").status_code == 200


@pytest.mark.slow
def test_a_signal_during_an_engine_restart_ends_all_processes(memory_plus_folder):
    with running(memory_plus_folder, "--engine-restarts", "1") as server:
        os.kill(engine_of(server), signal.SIGKILL)
        while not (pids := children(server.process.pid)) or server.http.get("/ready").is_success:
            pass
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
        assert all(map(ends, pids))


@pytest.mark.slow
def test_a_failed_engine_restart_is_retried(memory_plus_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(memory_plus_folder, folder)
    with running(folder, "--engine-restarts", "3") as server:
        (folder / "config.json").rename(folder / "hidden")
        os.kill(engine_of(server), signal.SIGKILL)
        while server.http.get("/ready").is_success:
            pass
        # the first restart fails, unless this rename is faster than the start of a process
        (folder / "hidden").rename(folder / "config.json")
        while not server.http.get("/ready").is_success:
            pass
        assert server.complete(prompt="x", max_tokens=2).status_code == 200


@pytest.mark.slow
def test_a_model_behind_a_link_is_served_by_the_name_of_the_link(memory_plus_folder, tmp_path):
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in memory_plus_folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "current").symlink_to(snapshot)
    with running(f"{tmp_path}/models--acme--tiny/../current/") as server:
        assert [one["id"] for one in server.http.get("/v1/models").json()["data"]] == ["current"]
        assert server.complete(prompt="x", max_tokens=1).status_code == 200
