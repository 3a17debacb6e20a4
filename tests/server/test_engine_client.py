"""Supervision of the engine process: a hung engine is killed and replaced."""

import asyncio
import queue
import threading
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import PatchRefusedError
from engine.messages import LoadPatch, PatchLoaded, UnloadPatch
from engine.process import EngineLostError, EngineProcess, run_engine
from engine.request import EngineStatistics, PatchSummary, Request, StepOutput, TokenOutput
from engine.sampling.params import SamplingParams
from server import engine_client
from server.config import SupervisionOptions
from server.engine_client import EngineClient
from tests.engine.test_process import CountingEngine


class HangingEngine(CountingEngine):
    """An engine whose first step never ends while its process sends heartbeats."""

    def step(self):
        threading.Event().wait()


def hangs_the_first_time(connection, marker: Path):
    """Entry function of an engine process: the first process hangs, later ones answer."""
    is_first = not marker.exists()
    marker.touch()
    run_engine(HangingEngine() if is_first else CountingEngine(), connection)


def test_an_engine_with_a_hung_step_is_replaced(tmp_path):
    entry = f"{__name__}:hangs_the_first_time"
    make_process = partial(EngineProcess, entry, tmp_path / "marker")
    process = make_process()
    process.start()
    supervision = SupervisionOptions(engine_restarts=1, stall_timeout_s=2.0)
    client = EngineClient(process, lambda statistics: None, supervision, make_process)

    async def answers(*names):
        stream = client.submit([Request(name, (5,), SamplingParams()) for name in names])
        return [output async for batch in stream.batches() for _, output in batch]

    async def scenario():
        client.attach()
        hung = await answers("a", "b")
        assert [output.finish_reason for output in hung] == ["error", "error"]
        assert not client.is_alive
        # the hung engine has a short timeout; its successor may be slow on a busy machine
        client._supervision = SupervisionOptions(engine_restarts=1, stall_timeout_s=60.0)
        (refused,) = await answers("c")
        assert refused.error == "the engine process has died"
        while not client.is_alive:
            await asyncio.sleep(0)
        assert [output.token_ids for output in await answers("d")] == [(5,)]
        await client.detach()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 120))
    finally:
        client.stop()


class SilentProcess:
    """A fake process that is alive but sends nothing."""

    def __init__(self):
        self.was_killed, self._end = False, threading.Event()

    def receive(self):
        self._end.wait()
        raise EOFError

    def send(self, *messages):
        pass

    def kill(self):
        self.was_killed = True

    def stop(self):
        self._end.set()


@pytest.mark.parametrize(("seconds", "is_killed"), [(0.9, True), (50.0, False)])
def test_a_silent_engine_is_killed_but_not_after_a_pause_of_the_server(
    monkeypatch, seconds, is_killed
):
    ticks = count()
    monkeypatch.setattr(engine_client, "WATCH_EVERY_S", 0.0)
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * seconds)
    monkeypatch.setattr(engine_client, "time", clock)
    process = SilentProcess()
    client = EngineClient(process, lambda statistics: None, SupervisionOptions(), SilentProcess)

    async def scenario():
        client.attach()
        stream = client.submit([Request("a", (5,), SamplingParams())])
        for _ in range(200):
            await asyncio.sleep(0)
        assert process.was_killed == is_killed != client.is_alive
        if is_killed:  # before the process has ended: it may still wait for a device
            ((_, output),) = [answer async for batch in stream.batches() for answer in batch]
            assert output.finish_reason == "error"
        await client.detach()

    try:
        asyncio.run(scenario())
    finally:
        process.stop()


class TalkingProcess(SilentProcess):
    """A fake process that sends the messages of the test."""

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


def final_step(request_id, running):
    """A step that finishes a request; ``running`` identifies the step."""
    output = TokenOutput(request_id, (7,), finish_reason="length")
    return StepOutput((output,), EngineStatistics(num_running=running))


def client_of(first, successor, on_statistics):
    options = SupervisionOptions(engine_restarts=1)
    return EngineClient(first, on_statistics, options, lambda: successor)


def test_late_messages_of_a_killed_engine_are_not_taken_for_its_successors(monkeypatch):
    monkeypatch.setattr(engine_client, "WATCH_EVERY_S", 0.0)
    first, successor, num_running = TalkingProcess(), TalkingProcess(), []
    client = client_of(
        first, successor, lambda statistics: num_running.append(statistics.num_running)
    )

    async def answer(name):
        stream = client.submit([Request(name, (5,), SamplingParams())])
        return [output async for batch in stream.batches() for _, output in batch]

    async def scenario():
        client.attach()
        hung = asyncio.ensure_future(answer("a"))
        await asyncio.sleep(0)
        # the watchdog kills the engine while a message of it is in the pipe
        client._supervision = SimpleNamespace(stall_timeout_s=-1.0)
        while client.is_alive:
            await asyncio.sleep(0)
        client._supervision = SupervisionOptions()
        first.messages.put(final_step("a", 11))
        assert (await hung)[0].finish_reason == "error"
        while not client.is_alive:
            await asyncio.sleep(0)
        successor.messages.put(final_step("b", 21))
        assert [output.token_ids for output in await answer("b")] == [(7,)]
        await client.detach()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    finally:
        first.stop()
        client.stop()
    assert num_running == [0, 21]


def test_tokens_are_delivered_if_statistics_fail():
    def broken(statistics):
        raise ArithmeticError("no such number")

    client = client_of(SilentProcess(), SilentProcess(), broken)

    async def scenario():
        stream = client.submit([Request("a", (5,), SamplingParams())])
        with pytest.raises(ArithmeticError):
            client.handle(final_step("a", 1))
        assert [batch[0][1].token_ids async for batch in stream.batches()] == [(7,)]

    asyncio.run(asyncio.wait_for(scenario(), 60))


class PatchingProcess(TalkingProcess):
    """A fake process that loads folders named by their content, ``refused`` ones excepted.

    It dies before it answers load number ``dies_before``, and after it answered ``dies_after``.
    """

    def __init__(self, refused=(), dies_before=None, dies_after=None):
        super().__init__()
        self.refused, self.sent = refused, []
        self.dies_before, self.dies_after = dies_before, dies_after

    def send(self, *messages):
        self.sent += messages
        for message in messages:
            if not isinstance(message, LoadPatch):
                continue
            if len(self.loads()) == self.dies_before:
                self.messages.put(None)
                return
            # statistics of an idle engine, as a process sends them
            self.messages.put(StepOutput((), EngineStatistics(num_running=len(self.sent))))
            name = Path(message.folder).name
            summary = None if name in self.refused else PatchSummary(name, 1, 12, {})
            self.messages.put(PatchLoaded(message.key, summary, "is gone"))
            if len(self.loads()) == self.dies_after:
                self.messages.put(None)

    def loads(self):
        return [m[1:] for m in self.sent if isinstance(m, LoadPatch)]


def test_a_new_engine_has_all_patches_before_it_accepts_requests(monkeypatch):
    monkeypatch.setattr(engine_client, "_RESTART_PAUSE_S", 0.0)
    first, dying = PatchingProcess(refused=("bad",)), PatchingProcess(dies_before=1)
    last = PatchingProcess(refused=("b",))
    successors, lost, running = [dying, last], [], []
    client = EngineClient(
        first,
        lambda statistics: running.append(statistics.num_running),
        SupervisionOptions(engine_restarts=2),
        lambda: successors.pop(0),
    )
    client.on_patch_lost = lambda content: lost.append((content, client.is_alive))

    async def scenario():
        client.attach()
        for name in "abc":
            assert (await client.load_patch(Path("/", name))).content_hash == name
        with pytest.raises(PatchRefusedError, match="^is gone$"):
            await client.load_patch(Path("/bad"))
        client.unload_patch("c", Path("/c"))
        assert first.sent[-1] == UnloadPatch("c")
        running.clear()
        first.messages.put(None)
        while client.is_alive:
            await asyncio.sleep(0)
        with pytest.raises(EngineLostError, match="is not running"):
            await client.load_patch(Path("/a"))
        while not client.is_alive:
            await asyncio.sleep(0)
        assert dying.loads() == [("/a", "a")]
        assert last.loads() == [("/a", "a"), ("/b", "b")]
        assert lost == [("b", False)]
        # no statistics of an engine that accepts no requests yet
        assert running == [0]
        await client.load_patch(Path("/c"))
        await client.detach()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    finally:
        for process in (first, dying):
            process.stop()
        client.stop()


@pytest.mark.parametrize("answers", [1, 2])
def test_an_engine_that_dies_between_or_after_its_loads_is_replaced(monkeypatch, answers):
    monkeypatch.setattr(engine_client, "_RESTART_PAUSE_S", 0.0)
    first, last = PatchingProcess(), PatchingProcess()
    dying = PatchingProcess(dies_after=answers)
    successors = [dying, last]
    client = EngineClient(
        first,
        lambda statistics: None,
        SupervisionOptions(engine_restarts=2),
        lambda: successors.pop(0),
    )
    died = client._engine_died

    def handle(process, message):
        """Both events of the dying process happen before the restart goes on."""
        client_handle(process, message)
        is_answer = process is dying and isinstance(message, PatchLoaded)
        if is_answer and len(dying.loads()) == answers:
            died(dying)

    client_handle = client._handle_from
    client._handle_from = handle

    async def scenario():
        client.attach()
        for name in "ab":
            await client.load_patch(Path("/", name))
        first.messages.put(None)
        while client.is_alive:
            await asyncio.sleep(0)
        while not client.is_alive:
            await asyncio.sleep(0)
        assert len(dying.loads()) == answers
        assert last.loads() == [("/a", "a"), ("/b", "b")]
        assert client._process is last
        await client.detach()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    finally:
        for process in (first, dying):
            process.stop()
        client.stop()
