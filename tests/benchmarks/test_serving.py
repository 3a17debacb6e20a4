"""``memplus bench serving`` against an in-process stub server: counts and failures."""

import json
import subprocess
import sys

import pytest

from benchmarks import serving
from benchmarks.serving_load import ServingLoad
from engine.errors import ConfigError
from server.cli.main import main
from tests.benchmarks.stub_server import STREAM_HEAD, chunked, events, response, stream
from tests.benchmarks.stub_server import serving as stub

SHORT = ["--input-len", "5", "--output-len", "3", "--seed", "1", "--timeout-s", "60"]


def bench(url, tmp_path, *options):
    """Run the command and return the objects of its JSON file."""
    file = tmp_path / "out.json"
    arguments = ["--base-url", url, *SHORT, "--json", str(file), *options]
    assert main(["bench", "serving", *arguments]) == 0
    return json.loads(file.read_text())


async def in_pieces(body, streams):
    whole = response(body)
    for start in range(0, len(whole), 5):
        streams[1].write(whole[start : start + 5])
        await streams[1].drain()
    return True


async def too_few_tokens(body, streams):
    streams[1].write(response(body, generated_tokens=body["max_tokens"] - 1))
    return True


async def too_short_prompt(body, streams):
    streams[1].write(response(body, prompt_tokens=4))
    return True


async def return_http_500(body, streams):
    streams[1].write(b"HTTP/1.1 500 Oh\r\nContent-Length: 10\r\n\r\nout of ink")
    return True


async def close_early(body, streams):
    streams[1].write(response(body)[:200])
    return False


async def close_without_response(body, streams):
    return False


async def hang(body, streams):
    streams[1].write(STREAM_HEAD + chunked(events(5, 1)[:1])[: -len(b"0\r\n\r\n")])
    await streams[0].read()  # until the client gives up
    return False


async def speak_smtp(body, streams):
    streams[1].write(b"220 mail.example.org ESMTP\r\n\r\n")
    return True


async def announce_close(body, streams):
    streams[1].write(response(body) + b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    return False


async def no_tokens(body, streams):
    streams[1].write(STREAM_HEAD + chunked(events(5, 3)[3:]))
    return True


@pytest.mark.parametrize("behaviour", [stream, in_pieces])
def test_a_sweep_over_concurrencies_counts_every_token(tmp_path, capsys, behaviour):
    with stub(behaviour) as server:
        results = bench(server.url, tmp_path, "--concurrency", "1", "3", "--num-prompts", "6")
    assert [result["max_concurrency"] for result in results] == [1, 3]
    for result in results:
        assert (result["completed"], result["failed"]) == (6, 0)
        assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 18)
        assert 0 < result["median_ttft_ms"] <= result["median_e2el_ms"]
        assert (result["model"], result["seed"]) == ("wordnet", 1)
    printed = capsys.readouterr().out
    assert printed.count("Successful requests:                     6") == 2
    assert "concurrency 3" in printed.splitlines()[-1]
    # connections are reused: never more than concurrent requests
    assert server.connections <= 3
    for body in server.bodies:
        assert body["temperature"] == 0 and body["ignore_eos"] and body["stream"]
        assert body["max_tokens"] == 3 and body["stream_options"] == {"include_usage": True}
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    # includes two warm-up requests per point
    assert len(set(prompts)) == len(prompts) == 16
    assert all(len(prompt) == 5 and min(prompt) >= 100 for prompt in prompts)


def test_a_sweep_over_rates_sends_without_waiting_for_responses(tmp_path):
    with stub(stream) as server:
        options = ["--request-rate", "500", "1e4", "--num-prompts", "7", "--warm-up", "0"]
        results = bench(server.url, tmp_path, *options)
    assert [result["request_rate"] for result in results] == [500, 1e4]
    assert [result["completed"] for result in results] == [7, 7]
    assert len(server.bodies) == 14


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (too_few_tokens, "2 tokens generated, not 3"),
        (too_short_prompt, "4 prompt tokens read, not 5"),
        (no_tokens, "no event with a token"),
        (return_http_500, "HTTP 500: out of ink"),
        (close_early, "the server closed the connection mid-response"),
        (close_without_response, "the server closed the connection unanswered"),
        (speak_smtp, "not an HTTP/1.1 response: '220 mail.example.org ESMTP'"),
    ],
)
def test_failures_are_counted_by_reason_and_the_rest_goes_on(tmp_path, capsys, behaviour, reason):
    with stub(stream, behaviour, stream) as server:
        options = ["--concurrency", "1", "--num-prompts", "4", "--warm-up", "0"]
        (result,) = bench(server.url, tmp_path, *options)
    if behaviour is close_without_response:
        # a request that fails so on a reused connection is retried
        assert (result["completed"], result["failed"]) == (4, 0)
        assert len(server.bodies) == 5
        return
    assert (result["completed"], result["failures"]) == (3, {reason: 1})
    assert result["total_output_tokens"] == 9
    assert f"failed 1 times: {reason}" in capsys.readouterr().out


def test_a_response_that_never_ends_times_out(tmp_path):
    with stub(hang) as server:
        options = ["--concurrency", "2", "--num-prompts", "3", "--warm-up", "0"]
        (result,) = bench(server.url, tmp_path, *options, "--timeout-s", "1")
    assert (result["completed"], result["failures"]) == (0, {"not answered in 1 s": 3})
    # each request needs a new connection: the old ones may still deliver stale bytes
    assert server.connections == 3


def test_a_request_without_response_on_a_new_connection_fails(tmp_path):
    with stub(close_without_response) as server:
        options = ["--concurrency", "2", "--num-prompts", "4", "--warm-up", "0"]
        (result,) = bench(server.url, tmp_path, *options)
    assert result["failures"] == {"the server closed the connection unanswered": 4}
    assert len(server.bodies) == 4


def test_a_connection_that_the_server_closes_is_not_reused(tmp_path):
    with stub(announce_close) as server:
        (result,) = bench(server.url, tmp_path, "--concurrency", "1", "--num-prompts", "3")
    assert result["completed"] == 3
    assert server.connections == 5


def test_text_prompts_use_the_server_s_token_counts(tmp_path):
    with stub(stream) as server:
        options = ["--concurrency", "1", "--num-prompts", "4", "--prompt-as", "text"]
        (result,) = bench(server.url, tmp_path, *options)
    assert result["total_input_tokens"] == 20
    prompts = {body["prompt"] for body in server.bodies}
    assert len(prompts) == 6 and all(len(prompt.split()) == 5 for prompt in prompts)


def test_a_failing_warm_up_stops_the_benchmark(capsys):
    with stub(return_http_500) as server:
        assert main(["bench", "serving", "--base-url", f"{server.url}/v1"]) == 2
        assert len(server.bodies) == 2
    assert f"{server.url}/v1: HTTP 500: out of ink" in capsys.readouterr().err
    # the server no longer listens
    assert main(["bench", "serving", "--base-url", server.url]) == 2
    assert "no connection: " in capsys.readouterr().err


def test_a_random_seed_is_printed(capsys):
    with stub(stream) as server:
        load = ServingLoad(server.url, input_len=4, output_len=2, concurrency=(1,), num_prompts=1)
        serving.measure(load, None, None)
        serving.measure(load, None, None)
    first, second = [line for line in capsys.readouterr().out.splitlines() if "seed" in line]
    assert first != second
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 6


def test_a_seed_determines_the_prompts_and_points_share_none():
    def prompts(load, purpose):
        bodies = load.bodies(load.rng(purpose), 20)
        return [tuple(json.loads(body)["prompt"]) for body in bodies]

    load = ServingLoad(seed=3, input_len=16, vocab_size=120)
    assert prompts(load, "a") == prompts(ServingLoad(seed=3, input_len=16, vocab_size=120), "a")
    assert {100, 119} <= {token for prompt in prompts(load, "a") for token in prompt}
    other = ServingLoad(seed=3, input_len=17, vocab_size=120)
    sets = [set(prompts(load, "a")), set(prompts(load, "b")), set(prompts(other, "a"))]
    heads = [{prompt[:8] for prompt in some} for some in sets]
    assert not heads[0] & heads[1] and not heads[0] & heads[2]


def test_the_default_number_of_requests_follows_the_load():
    assert [p.num_prompts for p in ServingLoad().points] == [8, 64, 256]
    assert [p.num_prompts for p in ServingLoad(request_rate=(0.5, 4)).points] == [15, 120]
    assert [p.num_prompts for p in ServingLoad(concurrency=(2, 4), num_prompts=9).points] == [9, 9]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_len", 0),
        ("output_len", 0),
        ("num_prompts", 0),
        ("concurrency", (1, 0)),
        ("request_rate", (1.0, 0.0)),
        ("request_rate", (float("inf"),)),
        ("warm_up", -1),
        ("temperature", float("nan")),
        ("vocab_size", 100),
        ("timeout_s", 0.0),
    ],
)
def test_a_load_out_of_range_is_named_in_the_error(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        ServingLoad(**{name: value})


def test_invalid_settings_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="^request_rate: cannot be combined with concurrency"):
        ServingLoad(concurrency=(1,), request_rate=(1.0,))
    for url in ("127.0.0.1:8000", "ftp://x", "http://", "http://x:y"):
        with pytest.raises(ConfigError, match="^base_url: "):
            serving.measure(ServingLoad(url), None, None)
    with pytest.raises(ConfigError, match="^plot: .* must end in one of .png"):
        serving.measure(ServingLoad(), None, tmp_path / "x.txt")


def test_missing_matplotlib_is_reported_before_any_request(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with stub(stream) as server:
        with pytest.raises(ConfigError, match="^plot: needs matplotlib"):
            serving.measure(ServingLoad(server.url), None, tmp_path / "x.png")
        assert not server.bodies


@pytest.mark.parametrize("sweep", ["--concurrency", "--request-rate"])
def test_a_sweep_is_plotted(tmp_path, sweep):
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.png"
    # all requests of the second point fail
    with stub(stream, stream, return_http_500) as server:
        options = [sweep, "100", "200", "--num-prompts", "2", "--warm-up", "0"]
        bench(server.url, tmp_path, *options, "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_client_never_loads_torch():
    code = "import sys, benchmarks.serving; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
