"""The engine process under watch: what hangs while it lives is noticed, answered for, replaced."""

import asyncio
import queue
import threading
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.process import EngineProcess, run_engine
from engine.request import EngineStatistics, Request, StepOutput, TokenOutput
from engine.sampling.params import SamplingParams
from server import engine_client
from server.config import SupervisionOptions
from server.engine_client import EngineClient
from tests.engine.test_process import CountingEngine


class HangingEngine(CountingEngine):
    """Its first step never ends, though its process lives and says so."""

    def step(self):
        threading.Event().wait()


def hangs_the_first_time(connection, marker: Path):
    """An entry function: the process started first hangs, those after it answer."""
    is_first = not marker.exists()
    marker.touch()
    run_engine(HangingEngine() if is_first else CountingEngine(), connection)


def test_a_step_that_never_ends_is_noticed_and_its_engine_replaced(tmp_path):
    entry = f"{__name__}:hangs_the_first_time"
    make_process = partial(EngineProcess, entry, tmp_path / "marker")
    process = make_process()
    process.start()
    supervision = SupervisionOptions(engine_restarts=1, stall_timeout_s=2.0)
    client = EngineClient(process, lambda statistics: None, supervision, make_process)

    async def answers(*names):
        stream = client.submit([Request(name, (5,), SamplingParams()) for name in names])
        return [output async for _, output in stream.outputs()]

    async def scene():
        client.attach()
        hung = await answers("a", "b")
        assert [output.finish_reason for output in hung] == ["error", "error"]
        assert not client.is_alive
        # the limit of the engine that hangs is short; its successor may be slow on a busy machine
        client._supervision = SupervisionOptions(engine_restarts=1, stall_timeout_s=60.0)
        (refused,) = await answers("c")
        assert refused.error == "the engine process has died"
        while not client.is_alive:
            await asyncio.sleep(0)
        assert [output.token_ids for output in await answers("d")] == [(5,)]
        await client.detach()

    try:
        asyncio.run(asyncio.wait_for(scene(), 120))
    finally:
        client.stop()


class SilentProcess:
    """A process that lives and says nothing."""

    def __init__(self):
        self.was_killed, self._end = False, threading.Event()

    def receive(self):
        self._end.wait()
        raise EOFError

    def send(self, message):
        pass

    def kill(self):
        self.was_killed = True

    def stop(self):
        self._end.set()


@pytest.mark.parametrize(("seconds", "is_ended"), [(0.9, True), (50.0, False)])
def test_silence_ends_an_engine_and_a_pause_of_everything_does_not(monkeypatch, seconds, is_ended):
    ticks = count()
    monkeypatch.setattr(engine_client, "WATCH_EVERY_S", 0.0)
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * seconds)
    monkeypatch.setattr(engine_client, "time", clock)
    process = SilentProcess()
    client = EngineClient(process, lambda statistics: None, SupervisionOptions(), SilentProcess)

    async def scene():
        client.attach()
        stream = client.submit([Request("a", (5,), SamplingParams())])
        for _ in range(200):
            await asyncio.sleep(0)
        assert process.was_killed == is_ended != client.is_alive
        if is_ended:  # though the process has not ended yet, as one that waits for a device
            ((_, output),) = [answer async for answer in stream.outputs()]
            assert output.finish_reason == "error"
        await client.detach()

    try:
        asyncio.run(scene())
    finally:
        process.stop()


class TalkingProcess(SilentProcess):
    """It says what the test puts."""

    def __init__(self):
        super().__init__()
        self.messages = queue.SimpleQueue()

    def start(self):
        pass

    def receive(self):
        message = self.messages.get()
        if message is None:
            raise EOFError
        return message

    def stop(self):
        self.messages.put(None)


def said(request_id, running):
    """A step that ends a request, with the number of those that run to know it by."""
    output = TokenOutput(request_id, (7,), finish_reason="length")
    return StepOutput((output,), EngineStatistics(num_running=running))


def client_of(first, successor, on_statistics):
    options = SupervisionOptions(engine_restarts=1)
    return EngineClient(first, on_statistics, options, lambda: successor)


def test_what_an_engine_said_before_it_was_given_up_is_not_its_successors(monkeypatch):
    monkeypatch.setattr(engine_client, "WATCH_EVERY_S", 0.0)
    first, successor, told = TalkingProcess(), TalkingProcess(), []
    client = client_of(first, successor, lambda statistics: told.append(statistics.num_running))

    async def answer(name):
        stream = client.submit([Request(name, (5,), SamplingParams())])
        return [output async for _, output in stream.outputs()]

    async def scene():
        client.attach()
        hung = asyncio.ensure_future(answer("a"))
        await asyncio.sleep(0)
        # the watch gives the engine up while a message of it lies in the pipe
        client._supervision = SimpleNamespace(stall_timeout_s=-1.0)
        while client.is_alive:
            await asyncio.sleep(0)
        client._supervision = SupervisionOptions()
        first.messages.put(said("a", 11))
        assert (await hung)[0].finish_reason == "error"
        while not client.is_alive:
            await asyncio.sleep(0)
        successor.messages.put(said("b", 21))
        assert [output.token_ids for output in await answer("b")] == [(7,)]
        await client.detach()

    try:
        asyncio.run(asyncio.wait_for(scene(), 60))
    finally:
        first.stop()
        client.stop()
    assert told == [0, 21]


def test_tokens_are_dealt_out_though_statistics_cannot_be():
    def broken(statistics):
        raise ArithmeticError("no such number")

    client = client_of(SilentProcess(), SilentProcess(), broken)

    async def scene():
        stream = client.submit([Request("a", (5,), SamplingParams())])
        with pytest.raises(ArithmeticError):
            client.handle(said("a", 1))
        assert [output.token_ids async for _, output in stream.outputs()] == [(7,)]

    asyncio.run(asyncio.wait_for(scene(), 60))
