"""Starts ``memplus serve`` as a subprocess on a free port."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx


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
        """The value of a metric without labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


@contextlib.contextmanager
def running(folder: Path, *options: str, new_group: bool = False) -> Iterator[Running]:
    """Serve a folder until the block ends; fail with the server's output if it does not start."""
    command = [
        sys.executable,
        "-m",
        "server.cli.main",
        "serve",
        "--model",
        str(folder),
        "--port",
        "0",
    ]
    command += ["--kv-cache-gib", "0.01", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stderr=pipe, text=True, start_new_session=new_group) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if " at http://" in line:
                    break
            else:
                raise AssertionError("".join(lines))
            url = line.split(" at ")[1].split(";")[0]
            with httpx.Client(base_url=url, timeout=60) as http:
                yield Running(process, url, http)
        finally:
            process.terminate()
            process.communicate(timeout=60)
