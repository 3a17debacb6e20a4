"""The engine process under watch: what hangs while it lives is noticed, answered for, replaced."""

import asyncio
import threading
from functools import partial
from pathlib import Path

from engine.process import EngineProcess, run_engine
from engine.request import Request
from engine.sampling_params import SamplingParams
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
        (refused,) = await answers("c")
        assert refused.error == "the engine process has ended"
        while not client.is_alive:
            await asyncio.sleep(0)
        assert [output.token_ids for output in await answers("d")] == [(5,)]
        await client.detach()

    try:
        asyncio.run(scene())
    finally:
        client.stop()
