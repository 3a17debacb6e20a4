"""A client that sends drawn requests, leaves early where it should, and checks the answers."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from tests.soak.drawn_requests import Choice, Cut, DrawnRequest, RequestSource

# the tolerance of log-probabilities, as in the tests of the engine
_LOGPROB_TOLERANCE = 1e-4


@dataclass
class Response:
    """The part of one response that a client received.

    Attributes:
        choices: text, ids, finish reason and log-probabilities by index.
        events: events with choices.
        is_whole: whether it was read to its end.
    """

    status: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    events: int = 0
    is_whole: bool = False
    retry_after: str | None = None

    def add(self, message: dict[str, Any]) -> None:
        """Add a whole response, or an event of a stream."""
        self.error = message.get("error") or self.error
        self.usage = message.get("usage") or self.usage
        self.events += bool(message.get("choices"))
        for one in message.get("choices") or ():
            before = self.choices.get(one["index"], Choice("", (), None, ()))
            scores = (one.get("logprobs") or {}).get("token_logprobs") or ()
            self.choices[one["index"]] = Choice(
                before.text + _text(one),
                (*before.ids, *(one.get("token_ids") or ())),
                one["finish_reason"] or before.reason,
                (*(before.logprobs or ()), *scores),
            )


@dataclass
class Totals:
    """Sums over the answers that were read to their end, and bounds on the others.

    A request counts once for each of its samples, as in the server's metrics.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cut_samples: int = 0
    cut_prompt_tokens: int = 0
    # of streams that had begun
    begun_samples: int = 0
    begun_prompt_tokens: int = 0

    def add_seeded(self, source: RequestSource) -> None:
        """Count the requests that ``source.ask_seeded`` has sent."""
        for answer in source.seeded_answers.values():
            self.reasons[str(answer.reason)] += 1
            self.generated_tokens += len(answer.ids)
        self.prompt_tokens += sum(len(body["prompt"]) for body in source.seeded_bodies())


def async_client(url: str) -> httpx.AsyncClient:
    """A client without a limit on connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=120)


async def together(
    number: int,
    requests: Iterable[DrawnRequest],
    send: Callable[[DrawnRequest], Awaitable[object]],
) -> None:
    """Send all requests, ``number`` of them at a time."""
    waiting = iter(requests)

    async def send_waiting() -> None:
        for request in waiting:
            await send(request)

    async with asyncio.TaskGroup() as group:
        for _ in range(number):
            group.create_task(send_waiting())


class LoadClient:
    """Sends requests over keep-alive connections of one event loop."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.totals = Totals()

    async def send(self, drawn: DrawnRequest) -> Response:
        """Send a request, check the answer, and count it; a refusal (503) is returned."""
        if drawn.cut is not None:
            return await self._send_cut(drawn, drawn.cut)
        response = Response()
        await self.exchange(drawn, response)
        if response.status == 503:
            assert response.retry_after == "1" and response.error is not None
            assert response.error["type"] == "overloaded_error"
            self.totals.refused += 1
            return response
        self._count(drawn, response)
        return response

    def _count(self, drawn: DrawnRequest, response: Response) -> None:
        samples = drawn.num_samples
        self.totals.prompt_tokens += samples * drawn.num_prompt_tokens
        if drawn.is_faulty:
            assert response.error is not None, drawn.body
            assert "ArithmeticError in the engine" in response.error["message"]
            self.totals.reasons["error"] += samples
            return
        check_answer(drawn, response)
        self._count_choices(response)

    def _count_choices(self, response: Response) -> None:
        for choice in response.choices.values():
            self.totals.reasons[str(choice.reason)] += 1
            self.totals.generated_tokens += len(choice.ids)

    async def _send_cut(self, drawn: DrawnRequest, cut: Cut) -> Response:
        response = Response()
        if cut.kind == "body":
            await self._send_half(drawn)
            return response
        if cut.kind == "events":
            await self.exchange(drawn, response, cut.events)
        else:
            call = asyncio.create_task(self.exchange(drawn, response))
            await asyncio.wait([call], timeout=cut.seconds)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
        assert response.status in (0, 200) and response.error is None, (response, drawn)
        prompt_tokens = drawn.num_samples * drawn.num_prompt_tokens
        if response.is_whole:  # it was as fast as its client's patience
            self.totals.prompt_tokens += prompt_tokens
            self._count_choices(response)
            return response
        self.totals.cut_samples += drawn.num_samples
        self.totals.cut_prompt_tokens += prompt_tokens
        if response.events:
            self.totals.begun_samples += drawn.num_samples
            self.totals.begun_prompt_tokens += prompt_tokens
        return response

    async def _send_half(self, drawn: DrawnRequest) -> None:
        url = self._http.base_url
        body = json.dumps(drawn.body).encode()
        head = f"POST {drawn.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body))
        writer.write(body[: len(body) // 2])
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def exchange(
        self, drawn: DrawnRequest, response: Response, most_events: int | None = None
    ) -> None:
        """Send a request; read all of the response, or this many events, into ``response``."""
        async with self._http.stream("POST", drawn.path, json=drawn.body) as reply:
            response.status = reply.status_code
            response.retry_after = reply.headers.get("retry-after")
            if not drawn.is_streamed or reply.status_code != 200:
                response.add(json.loads(await reply.aread()))
                response.is_whole = True
                return
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    response.is_whole = True
                elif line:
                    response.add(json.loads(line.removeprefix("data: ")))
                if response.events == most_events:
                    return


def check_answer(drawn: DrawnRequest, response: Response) -> None:
    """Assert that a response is whole and equals the plain loop's answer."""
    assert response.status == 200 and response.error is None, (response.error, drawn.body)
    assert response.is_whole and response.usage is not None, drawn.body
    expected = drawn.expected
    assert expected is not None
    assert sorted(response.choices) == list(range(drawn.num_samples))
    for choice in response.choices.values():
        wanted = replace(expected, logprobs=choice.logprobs)
        assert choice == wanted, f"{choice} is not {wanted} for {drawn.body}"
        if expected.logprobs is not None:
            assert choice.logprobs == pytest.approx(expected.logprobs, abs=_LOGPROB_TOLERANCE)
    assert response.usage["prompt_tokens"] == drawn.num_prompt_tokens
    assert response.usage["completion_tokens"] == drawn.num_samples * len(expected.ids)


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"]
    message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or ""
