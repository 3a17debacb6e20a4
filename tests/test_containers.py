"""The Dockerfiles and the compose file: users, health checks, dependencies and grace periods."""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from server.cli.environment import apply_environment
from server.cli.main import _SERVED
from server.cli.options import from_options
from server.config import HttpOptions
from tests.test_house import PACKAGES, ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


def instructions(file: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, continued lines joined."""
    lines = re.sub(r"\\\n", "", (DOCKER / file).read_text()).splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def arguments(file: str, name: str) -> list[str]:
    return [rest for word, rest in instructions(file) if word == name]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_images_can_pin_their_base_and_do_not_run_as_root(file):
    assert instructions(file)[0] == ("ARG", "BASE=debian:bookworm-slim")
    assert arguments(file, "FROM") == ["${BASE} AS build", "${BASE}"]
    assert [re.fullmatch(r"[1-9][0-9]+:[1-9][0-9]+", user)[0] for user in arguments(file, "USER")]
    assert arguments(file, "VOLUME") == ["/home/memplus/.cache"]
    assert set(arguments(file, "COPY")) >= {f"{package} {package}" for package in PACKAGES}
    assert [json.loads(one) for one in arguments(file, "ENTRYPOINT")] == [["memplus"]]
    assert [json.loads(one) for one in arguments(file, "CMD")] == [["serve"]]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_servers_accept_the_environment_of_their_image(file):
    text = " ".join(arguments(file, "ENV"))
    options = argparse.Namespace(config=None)
    variables = dict(re.findall(r"(MEMPLUS_\w+)=(\S+)", text))
    apply_environment(variables, options, _SERVED)
    assert from_options(HttpOptions, options).host == "0.0.0.0"


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_fails_unless_the_server_is_ready(status):
    (cuda,), (cpu,) = (arguments(file, "HEALTHCHECK") for file in DOCKERFILES[::-1])
    command = json.loads(cpu.partition("CMD ")[2])
    assert json.loads(cuda.partition("CMD ")[2]) == command
    assert command[0] == "python3"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        environment = os.environ | {"MEMPLUS_PORT": str(server.server_port)}
        environment |= {"http_proxy": "http://127.0.0.1:1"}  # containers often have one
        done = subprocess.run(
            [sys.executable, *command[1:]], env=environment, capture_output=True, timeout=60
        )
        server.shutdown()
        thread.join()
    assert (done.returncode == 0) == (status == 200), done


def test_an_image_leaves_out_the_packages_that_it_names():
    script = [sys.executable, str(DOCKER / "dependencies.py")]
    every = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    cpu = subprocess.run([*script, "triton"], capture_output=True, text=True, check=True).stdout
    assert set(every) - set(cpu.splitlines()) == {one for one in every if one.startswith("triton")}
    assert any(one.startswith("triton") for one in every)
    assert any(one.startswith("torch>") for one in cpu.splitlines())


def test_compose_waits_longer_than_the_drain_and_its_server_accepts_the_environment():
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["memplus"]
    options = argparse.Namespace(config=None)
    variables = {name: str(value) for name, value in service["environment"].items()}
    apply_environment(variables, options, _SERVED)
    drain = from_options(HttpOptions, options).drain_timeout_s
    # the processes need two seconds after the drain
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain + 2
    assert HttpOptions().drain_timeout_s + 2 <= 10  # `docker stop` without -t
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    (profile,) = [one for one in service["security_opt"] if one.startswith("seccomp:")]
    assert (DOCKER / profile.removeprefix("seccomp:")).is_file()
