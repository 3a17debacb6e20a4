"""``memplus bench http``: CPU time of the HTTP process per streamed token."""

import asyncio
import json
import multiprocessing
import selectors
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import uvicorn
from uvicorn.server import ServerState

from engine.process import EngineProcess
from engine.request import EngineStatistics, Request, RequestLimits, StepOutput, TokenOutput
from engine.sampling.params import TokenLogprobs
from server.config import SupervisionOptions, cache_folder
from server.engine_client import EngineClient
from server.http.admission import Admission
from server.http.app import create_app
from server.http.grammar_checker import GrammarChecker
from server.http.metrics import Metrics
from server.http.served_patches import ServedPatches
from server.http.service import Service
from server.http.transport.connection import Connection
from server.http.transport.connection_table import ConnectionTable
from server.limits import LimitOptions
from server.patch_options import PatchOptions
from weights.checkpoints.tokenizer import Tokenizer, load_tokenizer
from weights.models.prepare import prepared_folder

MANY = 2**40
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "5 logprobs": {"logprobs": 5}}


class Cost(NamedTuple):
    """CPU time of the HTTP process, from the engine's message to the socket."""

    us_per_token: float
    worst_step_ms: float


class RecordingProcess:
    """Takes the place of the engine process, and records its requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def send(self, *messages: object) -> None:
        self.requests += [message for message in messages if isinstance(message, Request)]


def measure(model: str, streams: int, steps: int) -> None:
    """Print the cost of each kind of request, with a model's tokenizer."""
    tokenizer = load_tokenizer(prepared_folder(model, cache_folder()))
    for kind, options in KINDS.items():
        cost = asyncio.run(streamed(tokenizer, streams, steps, options))
        print(
            f"{streams} streams, {kind}: {cost.us_per_token:.1f} us of CPU per token,"
            f" at most {cost.worst_step_ms:.1f} ms per step"
        )


async def streamed(tokenizer: Tokenizer, streams: int, steps: int, options: dict[str, Any]) -> Cost:
    """The cost of streams that get a token per step, over loopback sockets."""
    process, metrics = RecordingProcess(), Metrics("mock")
    engine = EngineClient(
        cast(EngineProcess, process), metrics.observe_step, SupervisionOptions(), _no_process
    )
    limits = LimitOptions()
    model_limits = RequestLimits(vocab_size=2**31, max_model_len=2**20)
    service = Service(
        model_name="mock",
        created=0,
        tokenizer=tokenizer,
        chat_template=None,
        limits=model_limits,
        engine=engine,
        admission=Admission(dict.fromkeys(("prompts", "tokens", "body_bytes"), MANY), print),
        metrics=metrics,
        options=limits,
        grammars=GrammarChecker(Path(), model_limits),
        patches=ServedPatches(engine, metrics.patches, PatchOptions(), 0),
    )
    config = uvicorn.Config(create_app(service, 2**20, 30), lifespan="off", log_level="warning")
    config.load()
    state, table = ServerState(), ConnectionTable(streams, lambda: None)

    def connection() -> Connection:
        return Connection(config, state, {}, limits=limits, table=table)

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    body = {"prompt": "a", "stream": True, "max_tokens": steps, **options}
    address = server.sockets[0].getsockname()
    arguments = (address, streams, json.dumps(body).encode())
    client = multiprocessing.get_context("spawn").Process(target=_read_all, args=arguments)
    client.start()
    try:
        while len(process.requests) < streams:
            await asyncio.sleep(0.01)
        names = [request.request_id for request in process.requests]
        outputs = [_output(names, step, steps, options) for step in range(steps)]
        return await _cost(engine, outputs, state, streams)
    finally:
        client.terminate()
        server.close()


async def _cost(
    engine: EngineClient, outputs: Sequence[StepOutput], state: ServerState, streams: int
) -> Cost:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    steps = []
    with receiver, sender:
        for output in outputs:
            sender.send(output)  # the engine process's work
            begin = time.process_time()
            engine.handle(receiver.recv())
            await asyncio.sleep(0.001)
            steps.append(time.process_time() - begin)
    begin = time.process_time()
    while state.connections:
        await asyncio.sleep(0.001)
    spent = sum(steps) + time.process_time() - begin
    return Cost(spent / (streams * len(outputs)) * 1e6, max(steps) * 1e3)


def _output(names: Sequence[str], step: int, steps: int, options: dict[str, Any]) -> StepOutput:
    """The output of one engine step, with a token for each request."""
    count, reason = options.get("logprobs"), "length" if step == steps - 1 else None
    outputs = []
    for place, name in enumerate(names):
        token_id = 300 + (step * 7 + place) % 1000
        top = tuple((token_id + i, -1.0 - i / 7) for i in range(count or 0))
        entries = () if count is None else (TokenLogprobs(token_id, -1.0, 1, top),)
        outputs.append(TokenOutput(name, (token_id,), reason, logprobs=entries))  # type: ignore[arg-type]
    return StepOutput(tuple(outputs), EngineStatistics(num_running=len(names)))


def _read_all(address: tuple[str, int], streams: int, body: bytes) -> None:
    """Send a request on each connection, and read until the server closes."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with selectors.DefaultSelector() as selector:
        for _ in range(streams):
            client = socket.create_connection(address)
            client.sendall(head.encode() + body)
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                client = cast(socket.socket, key.fileobj)
                if not client.recv(65536):
                    selector.unregister(client)
                    client.close()


def _no_process() -> EngineProcess:
    raise AssertionError("the engine does not end")
