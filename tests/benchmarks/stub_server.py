"""A small HTTP server in a thread that streams completions or fails as a test chooses."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# responds to one request; returns True if the connection can be reused
Behaviour = Callable[[Body, Streams], Awaitable[bool]]

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def events(prompt_tokens: int, generated_tokens: int, cached_tokens: int = 0) -> list[bytes]:
    """The events of a streamed response: one per token, the usage, and the end."""
    choice = {"index": 0, "text": ' a "choices":[] b', "finish_reason": None}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    tokens = [event({"choices": [choice], "usage": None})] * generated_tokens
    return [*tokens, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def chunked(parts: list[bytes]) -> bytes:
    """The parts as HTTP chunks, plus the final empty chunk."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def response(body: Body, **changes: int) -> bytes:
    """All bytes of a correct response; the prompt may be ids or words."""
    prompt = body["prompt"]
    length = len(prompt if isinstance(prompt, list) else prompt.split())
    counts = {"prompt_tokens": length, "generated_tokens": body["max_tokens"]} | changes
    return STREAM_HEAD + chunked(events(**counts))


async def stream(body: Body, streams: Streams) -> bool:
    """Respond correctly."""
    streams[1].write(response(body))
    return True


@dataclass
class StubServer:
    """A running server.

    Attributes:
        url: its base URL.
        bodies: JSON bodies of the received requests, in order.
        connections: number of opened connections.
    """

    url: str
    bodies: list[Body] = field(default_factory=list)
    connections: int = 0


@contextlib.contextmanager
def serving(*behaviours: Behaviour) -> Iterator[StubServer]:
    """Serve until the block ends; the last behaviour also handles all further requests."""
    server = StubServer("")
    is_ready = threading.Event()
    stops: list[Callable[[], object]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        # a client may close its connection at any time
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            try:
                is_reusable = True
                while is_reusable:
                    body = await _request(reader)
                    server.bodies.append(body)
                    index = min(len(server.bodies), len(behaviours)) - 1
                    is_reusable = await behaviours[index](body, (reader, writer))
            finally:
                writer.close()
                await writer.wait_closed()

    async def run() -> None:
        stop = asyncio.Event()
        stops.append(lambda: loop.call_soon_threadsafe(stop.set))
        loop = asyncio.get_running_loop()
        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        is_ready.set()
        await stop.wait()
        listener.close()
        in_flight = asyncio.all_tasks() - {asyncio.current_task()}
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert is_ready.wait(60)
    try:
        yield server
    finally:
        stops[0]()
        thread.join()


async def _request(reader: asyncio.StreamReader) -> Body:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    method, path, _ = head.split(" ", 2)
    assert (method, path) == ("POST", "/v1/completions")
    lengths = [line for line in head.split("\r\n") if line.startswith("Content-Length: ")]
    return json.loads(await reader.readexactly(int(lengths[0].split()[1])))
