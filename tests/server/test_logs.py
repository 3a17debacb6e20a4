"""Logs as text and JSON, of both processes, and what they never contain."""

import json
import logging
import subprocess
import sys

import pytest

from engine.errors import ConfigError
from server.logs import JsonFormatter, TextFormatter
from server.monitoring import MonitoringOptions
from server.request_id import CURRENT_ID
from tests.server.running import running, serve_command


def record(name, level, message, *arguments, **extra):
    made = logging.LogRecord(name, level, "file", 1, message, arguments, None)
    made.__dict__ |= extra
    return made


def test_text_lines_have_a_level_a_logger_and_the_request_id():
    lines = TextFormatter()
    assert lines.format(record("memplus", logging.INFO, "serving %s", "x")) == "serving x"
    warning = record("server.serve", logging.WARNING, "slow")
    assert lines.format(warning) == "WARNING: server.serve: slow"
    token = CURRENT_ID.set("job-7")
    assert lines.format(warning) == "WARNING: server.serve: slow [job-7]"
    CURRENT_ID.reset(token)


def test_json_records_are_one_line_with_fields_and_traceback():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failed = record("a", logging.ERROR, "it\nfailed", exc_info=sys.exc_info(), fields={"n": 1})
    token = CURRENT_ID.set("job-7")
    line = JsonFormatter().format(failed)
    CURRENT_ID.reset(token)
    values = json.loads(line)
    assert "\n" not in line and values.pop("traceback").endswith("ValueError: two\nlines")
    assert values.pop("time").endswith("+00:00")
    assert values == {
        "level": "ERROR",
        "logger": "a",
        "process": "MainProcess",
        "message": "it\nfailed",
        "request_id": "job-7",
        "n": 1,
    }


@pytest.mark.parametrize("prefix", ["", "1x", "a-b", "x" * 65, "a b"])
def test_a_malformed_metrics_prefix_is_an_error(prefix):
    with pytest.raises(ConfigError, match="^metrics_prefix: "):
        MonitoringOptions(metrics_prefix=prefix)


KEY = "open-sesame-9"
SECRET = "zanzibar"
GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


def use(server) -> str:
    """Requests of all kinds with a secret prompt; the text of the answers."""
    http = server.http
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "job-7"}
    calls = [
        ("/v1/completions", {"prompt": SECRET, **GREEDY}),
        ("/v1/completions", {"prompt": SECRET, "logprobs": 2, "echo": True, **GREEDY}),
        ("/v1/completions", {"prompt": SECRET, "stream": True, **GREEDY}),
        ("/v1/completions", {"prompt": SECRET, "temperature": SECRET}),
        ("/v1/completions", {"prompt": SECRET * 500, **GREEDY}),
        ("/v1/completions", {"prompt": SECRET, SECRET: SECRET}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]}),
        ("/tokenize", {"prompt": SECRET}),
    ]
    texts = []
    for path, body in calls:
        answer = http.post(path, json=body, headers=headers)
        assert answer.status_code in (200, 400)
        texts.append(answer.text)
    http.post("/v1/completions", content=SECRET, headers=headers)
    http.post("/v1/completions", json={"prompt": SECRET}, headers={"Authorization": "Bearer no"})
    http.get(f"/v1/models/other?api_key={KEY}&prompt={SECRET}", headers=headers)
    return json.loads(texts[0])["choices"][0]["text"]


def test_logs_and_metrics_have_no_prompt_key_or_completion(memory_plus_folder):
    options = ("--api-key", KEY, "--access-log", "--log-format", "json")
    with running(memory_plus_folder, *options) as server:
        completion = use(server)
        metrics = server.http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})
        server.process.terminate()
        lines = server.process.stderr.read().splitlines()
        assert server.process.wait(timeout=60) == 0
    logged = [json.loads(line) for line in lines]
    assert metrics.status_code == 200 and len(completion) > 20
    written = "\n".join(lines) + metrics.text
    assert SECRET not in written and KEY not in written
    assert completion not in written and json.dumps(completion)[1:-1] not in written
    access = [one for one in logged if one["logger"] == "server.http.access_log"]
    assert len(access) == 12 and {one["status"] for one in access} >= {200, 400, 401, 404}
    assert [one["request_id"] for one in access[:8]] == ["job-7"] * 8


def test_both_processes_log_json_from_the_first_line_to_the_last(memory_plus_folder):
    command = serve_command(memory_plus_folder, "--log-format", "json", "--device", "cuda:99")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 2
    assert lines[0]["message"].startswith("threads: ")
    assert lines[-1]["level"] == "ERROR" and "cuda:99" in lines[-1]["message"]
    assert {one["process"] for one in lines} <= {"MainProcess", "memplus-engine"}
