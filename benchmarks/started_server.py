"""Starts ``memplus serve`` on a free port for a benchmark."""

import contextlib
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from engine.process import EngineStartError


def last_words(lines: Sequence[str]) -> str:
    """The line about the error that ended a memplus process; all lines if it has no such line."""
    last = next((one.strip() for one in reversed(lines) if one.strip()), "")
    prefix = "memplus: "
    return last.removeprefix(prefix) if last.startswith(prefix) else "".join(lines)


@contextlib.contextmanager
def started_server(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The URL of a server with these arguments, once it is ready; it ends with the block.

    Raises:
        EngineStartError: the server did not start.
    """
    command = [sys.executable, "-m", "server.cli.main", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if " at http://" in line:
                    break
            else:
                raise EngineStartError(f"the server did not start: {last_words(lines)}")
            # a full pipe would stop the server
            threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()
            yield line.split(" at ")[1].split(";")[0]
        finally:
            server.terminate()
            server.wait()
