"""A small HTTP server, in a thread, that streams completions or fails in a chosen way."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# answers one request; True where the connection may be used again
Behaviour = Callable[[Body, Streams], Awaitable[bool]]

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def events(prompt_tokens: int, generated_tokens: int, cached_tokens: int = 0) -> list[bytes]:
    """The events of a streamed answer, one a token, the usage, and the end."""
    choice = {"index": 0, "text": ' a "choices":[] b', "finish_reason": None}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    tokens = [event({"choices": [choice], "usage": None})] * generated_tokens
    return [*tokens, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def chunked(parts: list[bytes]) -> bytes:
    """The parts as HTTP chunks, and the last one."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def answer(body: Body, **changes: int) -> bytes:
    """All the bytes of the answer to a request whose prompt is ids or words."""
    prompt = body["prompt"]
    length = len(prompt if isinstance(prompt, list) else prompt.split())
    counts = {"prompt_tokens": length, "generated_tokens": body["max_tokens"]} | changes
    return STREAM_HEAD + chunked(events(**counts))


async def stream(body: Body, streams: Streams) -> bool:
    """As it should be."""
    streams[1].write(answer(body))
    return True


@dataclass
class StubServer:
    """A running server.

    Attributes:
        url: where it listens.
        bodies: of the requests that came, in order.
        connections: how many were opened.
    """

    url: str
    bodies: list[Body] = field(default_factory=list)
    connections: int = 0


@contextlib.contextmanager
def serving(*behaviours: Behaviour) -> Iterator[StubServer]:
    """Serve until the block ends; the last behaviour stands for all further requests."""
    server = StubServer("")
    is_ready = threading.Event()
    ends: list[Callable[[], object]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        # a client that goes is no error of ours
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            try:
                goes_on = True
                while goes_on:
                    body = await _request(reader)
                    server.bodies.append(body)
                    turn = min(len(server.bodies), len(behaviours)) - 1
                    goes_on = await behaviours[turn](body, (reader, writer))
            finally:
                writer.close()
                await writer.wait_closed()

    async def run() -> None:
        stop = asyncio.Event()
        ends.append(lambda: loop.call_soon_threadsafe(stop.set))
        loop = asyncio.get_running_loop()
        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        is_ready.set()
        await stop.wait()
        listener.close()
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert is_ready.wait(60)
    try:
        yield server
    finally:
        ends[0]()
        thread.join()


async def _request(reader: asyncio.StreamReader) -> Body:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    method, path, _ = head.split(" ", 2)
    assert (method, path) == ("POST", "/v1/completions")
    lengths = [line for line in head.split("\r\n") if line.startswith("Content-Length: ")]
    return json.loads(await reader.readexactly(int(lengths[0].split()[1])))
