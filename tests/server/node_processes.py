"""Starts nodes of a tensor-parallel model as processes; loopback addresses play machines."""

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.server.running import serve_command

# nodes reach it from 127.0.0.1
MASTER = "127.0.0.2"
KEY = "the secret of all nodes in a test"


def free_port() -> int:
    """A port of node 0 that nobody uses now."""
    with socket.create_server((MASTER, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def node_options(count: int, ranks: int, port: int, key_file: Path) -> list[str]:
    """Options that all nodes have, with a new key file."""
    key_file.write_text(KEY)
    options = ["--tensor-parallel", str(ranks), "--nnodes", str(count), "--threads", str(ranks)]
    return [*options, *("--master-addr", MASTER, "--master-port", str(port)), *keyed(key_file)]


def keyed(file: Path) -> list[str]:
    """The option of a key file."""
    return ["--node-key-file", str(file)]


@contextlib.contextmanager
def node(folder: Path, number: int, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """A node that runs until the block ends; its lines are in its ``stderr``."""
    command = serve_command(folder, *options, "--node-rank", str(number))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
