"""Sends the requests of one point of a sweep and collects their results."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable

from benchmarks.completion_client import Completion, CompletionClient
from benchmarks.http_answer import ResponseError, StatusError
from benchmarks.serving_load import ServingLoad

_REFUSED = 503


class LoadRun:
    """The requests of one load point and their results.

    Attributes:
        completions: results of the requests that got exactly the tokens that they asked for.
        failures: counts of the other requests, by reason.
        refusals: seconds from sending to the end of each response with status 503; these requests
            are among the failures.
    """

    def __init__(
        self, client: CompletionClient, load: ServingLoad, on_end: Callable[[], object]
    ) -> None:
        """``on_end`` is called after each request, successful or not."""
        self.completions: list[Completion] = []
        self.failures: Counter[str] = Counter()
        self.refusals: list[float] = []
        self._client = client
        self._load = load
        self._on_end = on_end

    async def send_concurrently(
        self, bodies: Iterable[bytes], concurrency: int, gap_s: float = 0.0
    ) -> None:
        """Send all requests, ``concurrency`` of them in flight at a time.

        The first ones are ``gap_s`` seconds apart, so that they do not all end together.
        """
        waiting = iter(bodies)

        async def send_waiting() -> None:
            for body in waiting:
                await self._send(body)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send_waiting())
                await asyncio.sleep(gap_s)

    async def send_at_rate(self, bodies: Iterable[bytes], rate: float, rng: random.Random) -> None:
        """Send ``rate`` requests per second on average, without waiting for responses.

        The gaps are exponentially distributed, so the arrivals are a Poisson process.
        """
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for body in bodies:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._send(body))
                due += rng.expovariate(rate)

    async def _send(self, body: bytes) -> None:
        sent = time.perf_counter()
        try:
            completion = await self._client.complete(body)
            self._check(completion)
        except ResponseError as error:
            if isinstance(error, StatusError) and error.status == _REFUSED:
                self.refusals.append(time.perf_counter() - sent)
            self.failures[str(error)] += 1
        else:
            self.completions.append(completion)
        self._on_end()

    def _check(self, completion: Completion) -> None:
        usage, load = completion.usage, self._load
        if usage.generated_tokens != load.output_len:
            raise ResponseError(f"{usage.generated_tokens} tokens generated, not {load.output_len}")
        # only the server knows how many tokens a text has
        if load.prompt_as == "ids" and usage.prompt_tokens != load.input_len:
            raise ResponseError(f"{usage.prompt_tokens} prompt tokens read, not {load.input_len}")
        if not completion.token_times:
            raise ResponseError("no event with a token")
