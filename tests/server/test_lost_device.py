"""A lost device ends the engine process; the next one gives the same tokens."""

import asyncio
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.executors.batch import DeviceLostError
from engine.process import EngineProcess, run_engine
from server.config import SupervisionOptions
from server.engine_client import EngineClient
from tests.engine.delayed_executor import delayed
from tests.models import engine_of, greedy, plain_greedy, random_model, tiny_config

PROMPT, COUNT = [1, 2, 3], 6


def model():
    torch.manual_seed(1)
    return random_model(tiny_config())


def loses_its_device_the_first_time(connection, marker: Path):
    """Entry function of an engine process: the first one's device fails in the fourth step."""
    is_first = not marker.exists()
    marker.touch()
    engine = engine_of(model(), EngineConfig(kv_cache_gib=0.001), make=delayed)
    if is_first:
        executor = engine._executor
        run, steps = executor.run, []

        def fail(step):
            steps.append(step)
            if len(steps) == 4:
                raise DeviceLostError("an illegal memory access")
            return run(step)

        executor.run = fail
    run_engine(engine, connection)


@pytest.mark.slow
def test_an_engine_whose_device_is_lost_is_replaced(tmp_path, capfd):
    entry = f"{__name__}:loses_its_device_the_first_time"
    make_process = partial(EngineProcess, entry, tmp_path / "marker")
    process = make_process()
    process.start()
    supervision = SupervisionOptions(engine_restarts=1, stall_timeout_s=60.0)
    client = EngineClient(process, lambda statistics: None, supervision, make_process)

    async def answer(name):
        stream = client.submit([greedy(name, PROMPT, COUNT)])
        return [output async for batch in stream.batches() for _, output in batch]

    async def scenario():
        client.attach()
        lost = await answer("a")
        assert lost[-1].finish_reason == "error"
        while not client.is_alive:
            await asyncio.sleep(0)
        found = [token for output in await answer("b") for token in output.token_ids]
        assert found == plain_greedy(model(), PROMPT, COUNT)
        await client.detach()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 120))
    finally:
        client.stop()
    assert "DeviceLostError: an illegal memory access" in capfd.readouterr().err
