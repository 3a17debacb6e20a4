"""The load of docker/verify.sh separates whole streams from lost ones, on a fake server."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.test_house import ROOT

TOKEN = {"choices": [{"text": " three", "finish_reason": None}]}
RESULT = {"choices": [{"text": "", "finish_reason": "length"}]}
ERROR = {"error": {"message": "the server is shutting down"}}
DONE = "[DONE]"
CLOSED = "the connection is closed inside the body"


@contextmanager
def streaming(events: list) -> Iterator[str]:
    """The URL of a server that answers each POST with these events."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if not events:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            for event in events:
                if event == CLOSED:
                    self.wfile.write(b"ff\r\n")
                    return
                text = event if event == DONE else json.dumps(event)
                line = f"data: {text}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *arguments: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("events", "end", "status"),
    [
        ([TOKEN, RESULT, DONE], "a result", 0),
        ([TOKEN, ERROR, DONE], "an error event", 0),
        ([TOKEN], "a cut", 1),
        ([TOKEN, RESULT], "a cut", 1),
        ([TOKEN, DONE], "nothing", 1),
        ([TOKEN, CLOSED], "IncompleteRead", 1),
        ([], "HTTPError", 1),
    ],
)
def test_a_stream_is_lost_without_a_result_or_an_error_event(events, end, status):
    command = [sys.executable, str(ROOT / "docker" / "verify_load.py")]
    with streaming(events) as url:
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["started", f"8 ended with {end}"]
    assert (done.returncode, done.stderr) == (status, "")
