"""Token streams: order, ends, slow readers, and the bound on unread outputs."""

import asyncio

import pytest

from engine.request import TokenOutput
from engine.sampling.params import TokenLogprobs
from server.token_stream import SlowReaderError, TokenStream, UnreadOutputs


class Desk:
    """Streams that share a bound, and records of what they abort and end."""

    def __init__(self, limit=1000):
        self.aborted, self.ended = [], []
        self.unread = UnreadOutputs(limit)

    def stream(self, *names):
        return TokenStream(names, self.aborted.append, self.ended.append, self.unread)


async def read(stream):
    return [output async for batch in stream.batches() for output in batch]


def test_outputs_come_in_order_and_requests_end_before_they_are_read():
    async def scenario():
        desk = Desk()
        stream = desk.stream("a", "b")
        for output in (TokenOutput("a", (1,)), TokenOutput("b", (2,), "stop")):
            stream.put(output)
        assert desk.ended == [1]
        stream.put(TokenOutput("a", (3,), "length"))
        assert desk.ended == [1, 0]
        ids = [(index, output.token_ids) for index, output in await read(stream)]
        assert ids == [(0, (1,)), (0, (3,)), (1, (2,))]
        stream.close()
        assert desk.aborted == []

    asyncio.run(scenario())


def test_many_unread_outputs_are_merged_but_an_error_stays_apart():
    async def scenario():
        stream = Desk().stream("a")
        entry = TokenLogprobs(5, -1.0, 1, ())
        stream.put(TokenOutput("a", (0,), logprobs=(entry,), cached_tokens=4))
        for number in range(1, 100):
            stream.put(TokenOutput("a", (number,), logprobs=(entry,)))
        stream.put(TokenOutput("a", finish_reason="error", error="oh"))
        (_, whole), (_, error) = await read(stream)
        assert whole.token_ids == tuple(range(100)) and len(whole.logprobs) == 100
        assert whole.cached_tokens == 4 and whole.finish_reason is None
        assert error.error == "oh" and error.token_ids == ()

    asyncio.run(scenario())


def test_the_slowest_reader_is_ended_when_too_much_is_unread():
    async def scenario():
        desk = Desk(limit=20)
        slow, quick = desk.stream("slow"), desk.stream("quick")
        for number in range(8):
            slow.put(TokenOutput("slow", (number,)))
        quick.put(TokenOutput("quick", (1,)))
        assert desk.aborted == []
        slow.put(TokenOutput("slow", (9,)))
        slow.put(TokenOutput("slow", (9,)))
        assert desk.aborted == ["slow"] and desk.ended == [0]
        with pytest.raises(SlowReaderError):
            await read(slow)
        quick.put(TokenOutput("quick", (2,), "stop"))
        assert [output.token_ids for _, output in await read(quick)] == [(1,), (2,)]
        slow.close()
        quick.close()
        assert desk.unread._total == 0 and not desk.unread._streams

    asyncio.run(scenario())


def test_fail_ends_the_stream_after_what_has_arrived():
    async def scenario():
        desk = Desk()
        stream = desk.stream("a", "b")
        stream.put(TokenOutput("a", (1,)))
        stream.put(TokenOutput("b", (2,), "stop"))
        stream.fail(TimeoutError("late"))
        stream.put(TokenOutput("a", (3,)))
        assert desk.aborted == ["a"] and sorted(desk.ended) == [0, 1]
        seen = []
        with pytest.raises(TimeoutError):
            async for batch in stream.batches():
                seen += [output.token_ids for _, output in batch]
        assert seen == [(1,), (2,)]
        whole = desk.stream("c")
        whole.put(TokenOutput("c", (1,), "stop"))
        whole.fail(TimeoutError("too late to matter"))
        assert len(await read(whole)) == 1

    asyncio.run(scenario())
