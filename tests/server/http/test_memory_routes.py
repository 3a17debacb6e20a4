"""Memory made visible: traces of requests, and the tables with their most-read rows."""

import asyncio

import pytest

from engine.messages import DescribeMemory, MemoryReport
from engine.process import EngineLostError
from tests.models import plain_greedy
from tests.server.http.test_app import build
from tests.server.http.test_completions import GREEDY, stream
from weights.checkpoints.checkpoint import load_model

PROMPT = [77, 101, 109]


@pytest.fixture(scope="module")
def model(memory_plus_folder):
    return load_model(memory_plus_folder)[0]


def test_a_trace_names_rows_and_weights_of_each_token_and_layer(memory_server, model):
    body = {"prompt": PROMPT, "max_tokens": 5, "memory_trace": True, "return_token_ids": True}
    (choice,) = memory_server.complete(**body, **GREEDY).json()["choices"]
    assert choice["token_ids"] == plain_greedy(model, PROMPT, 5)
    assert len(choice["memory_trace"]) == 5
    for token in choice["memory_trace"]:
        assert [read["layer"] for read in token] == [1, 3]
        for read in token:
            assert len(read["rows"]) == len(read["weights"]) <= 8
            assert all(0 <= row < 64 for row in read["rows"])
            assert sum(read["weights"]) <= 2.001  # two heads
    events = stream(memory_server, **body, **GREEDY)
    streamed = [token for event in events for token in event["choices"][0]["memory_trace"]]
    assert streamed == choice["memory_trace"]


def test_chat_answers_have_traces_too(memory_server):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "memory_trace": True}
    answered = memory_server.http.post("/v1/chat/completions", json=body | GREEDY).json()
    assert len(answered["choices"][0]["memory_trace"]) == 3


def test_without_the_option_there_is_no_trace(memory_server):
    (choice,) = memory_server.complete(prompt="a", max_tokens=2).json()["choices"]
    assert "memory_trace" not in choice


def test_the_tables_are_described(memory_server):
    memory_server.complete(prompt="a", max_tokens=40, **GREEDY)
    (table,) = memory_server.http.get("/v1/memory").json()["data"]
    assert {name: table[name] for name in ("tier", "rows", "row_values", "layers")} == {
        "tier": "device",
        "rows": 64,
        "row_values": 24,
        "layers": [1, 3],
    }
    usage = table["usage"]
    assert usage["counted_reads"] > 0
    reads = [row["reads"] for row in usage["most_read"]]
    assert reads == sorted(reads, reverse=True)
    in_bucket = [bucket for bucket in usage["histogram"] if bucket["rows"]]
    assert in_bucket[-1]["min_reads"] <= reads[0] <= in_bucket[-1]["max_reads"]


def test_concurrent_callers_share_a_report():
    process, service, _ = build()

    async def scenario():
        asks = [asyncio.create_task(service.engine.memory_report()) for _ in range(3)]
        await asyncio.sleep(0)
        assert process.sent == [DescribeMemory()]
        asks[0].cancel()
        service.engine._handle_from(process, MemoryReport(()))
        return await asyncio.gather(*asks, return_exceptions=True)

    first, *others = asyncio.run(scenario())
    assert isinstance(first, asyncio.CancelledError)
    assert others == [MemoryReport(())] * 2


def test_a_dead_engine_has_no_report():
    process, service, _ = build()

    async def scenario():
        ask = asyncio.create_task(service.engine.memory_report())
        await asyncio.sleep(0)
        process.stop = lambda: None
        service.engine._engine_died(process)
        with pytest.raises(EngineLostError, match="has died"):
            await ask
        with pytest.raises(EngineLostError, match="is not running"):
            await service.engine.memory_report()

    asyncio.run(scenario())
