"""Clients that send nonsense, send nothing, or read nothing, and what the server answers."""

import asyncio
import contextlib
import json
import socket

import httpx

from tests.server.faulty_serve import FAULTY_ID

NUM_IDLE = 50
NUM_DEAF = 3
# answers of this many samples do not fit into the buffers of two sockets
DEAF = {
    "prompt": [1, 2, 3],
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
    "n": 32,
    "logprobs": 5,
    "logit_bias": {str(FAULTY_ID): -100},
}
NONSENSE = (
    (b"{", 400),
    (b"[]", 400),
    (b'{"prompt": "x", "novel": 1}', 400),
    (b'{"prompt": [1000]}', 400),
    (b'{"prompt": "x", "n": 65}', 400),
    (b'{"prompt": "x", "model": "other"}', 404),
    (b'{"prompt": ' + b"[" * 100, 400),
    (json.dumps({"prompt": "x" * 5000}).encode(), 400),
    (json.dumps({"prompt": "x" * 5 * 2**20}).encode(), 413),
)


class HostileClients:
    """Connections that are idle or read nothing, and a client that sends nonsense.

    All stay until the block ends. A wrong answer to nonsense fails the block.

    Attributes:
        num_refused: nonsense that was refused as it should be.
    """

    def __init__(self, http: httpx.AsyncClient, address: tuple[str, int]) -> None:
        self._http, self._address = http, address
        self._idle: list[socket.socket] = []
        self._deaf: list[socket.socket] = []
        self._nonsense: asyncio.Task[None] | None = None
        self.num_refused = 0

    async def __aenter__(self) -> "HostileClients":
        self._idle = [socket.create_connection(self._address) for _ in range(NUM_IDLE)]
        self._deaf = [self._read_nothing() for _ in range(NUM_DEAF)]
        self._nonsense = asyncio.create_task(self._send_nonsense())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._nonsense is not None
        self._nonsense.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._nonsense
        for one in (*self._idle, *self._deaf):
            one.close()

    def were_cut(self) -> bool:
        """Whether the server has closed all connections that read nothing, before their ends."""
        return all(map(_was_cut, self._deaf))

    async def send_slowly(self) -> None:
        """Send half of a body and expect a 408."""
        reader, writer = await asyncio.open_connection(*self._address)
        writer.write(_post(b"{" + b" " * 1000)[:-500])
        assert b" 408 " in await reader.read(65536)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _send_nonsense(self) -> None:
        while True:
            for content, status in NONSENSE:
                headers = {"Content-Type": "application/json"}
                answer = await self._http.post("/v1/completions", content=content, headers=headers)
                assert answer.status_code == status, (content[:80], answer.text)
                assert answer.json()["error"]["message"]
                self.num_refused += 1

    def _read_nothing(self) -> socket.socket:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(self._address)
        deaf.sendall(_post(json.dumps(DEAF).encode()))
        return deaf


def _was_cut(deaf: socket.socket) -> bool:
    deaf.settimeout(30)
    data, end = b"", b""
    with contextlib.suppress(ConnectionResetError):
        while data := deaf.recv(65536):
            end = (end + data)[-100:]
    return b"[DONE]" not in end


def _post(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
