"""Starts Debian's Prometheus for tests of the monitoring files."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.programs import started


def tool(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``; AssertionError with the command to install it."""
    path = shutil.which(name)
    assert path, f"{name} is missing: apt-get install --no-install-recommends prometheus"
    return path


@contextlib.contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[httpx.Client]:
    """A client for the HTTP API of a Prometheus with this configuration; data go to ``folder``."""
    command = [
        tool("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with (
        started(command, r'"Listening on" address=(\S+)') as (_, found),
        httpx.Client(base_url=f"http://{found[1]}/api/v1", timeout=30) as client,
    ):
        yield client
