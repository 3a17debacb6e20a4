"""Starts ``memplus serve`` as a subprocess on a free port."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.programs import started


@dataclass
class Running:
    """A started server and a client for it."""

    process: subprocess.Popen[str]
    url: str
    http: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def complete(self, **body) -> httpx.Response:
        """POST a completion; None fields are sent as null."""
        return self.http.post("/v1/completions", json=body)

    def metric(self, name: str) -> float:
        """The value of a metric that has no label but the model's name."""
        lines = self.http.get("/metrics").text.splitlines()
        pattern = re.compile(re.escape(name) + r'\{model_name="[^"]*"\} (\S+)')
        return next(float(found[1]) for line in lines if (found := pattern.fullmatch(line)))


def serve_command(folder: Path, *options: str) -> list[str]:
    """The command that serves a folder, on a free port unless on a unix socket."""
    command = [sys.executable, "-m", "server.cli.main", "serve", "--model", str(folder)]
    port = [] if "--uds" in options else ["--port", "0"]
    return [*command, *port, "--kv-cache-gib", "0.01", *options]


@contextlib.contextmanager
def running(
    folder: Path,
    *options: str,
    new_group: bool = False,
    client: Callable[[str], httpx.Client] = lambda url: httpx.Client(base_url=url, timeout=60),
    program: str | None = None,
) -> Iterator[Running]:
    """Serve a folder until the block ends; fail with the server's output if it does not start.

    ``client`` makes the client for the server's URL; ``program`` replaces ``server.cli.main``.
    """
    command = serve_command(folder, *options)
    if program is not None:
        command[2] = program
    pattern = r"serving .* at ((http|unix)[^;]+);"
    ready = started(command, pattern, new_group=new_group)
    with ready as (process, found), client(found[1]) as http:
        yield Running(process, found[1], http)
