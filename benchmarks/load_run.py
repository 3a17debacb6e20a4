"""Sends the requests of one point of a sweep, and keeps what came of each."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.completion_client import Answer, CompletionClient
from benchmarks.http_answer import AnswerError
from benchmarks.serving_load import ServingLoad


class LoadRun:
    """Requests that were sent together, and their ends.

    Attributes:
        answers: of the requests that got exactly what they asked for.
        failures: how many others there were, by reason.
    """

    def __init__(
        self, client: CompletionClient, load: ServingLoad, on_end: Callable[[], object]
    ) -> None:
        """``on_end`` is called at the end of each request."""
        self.answers: list[Answer] = []
        self.failures: Counter[str] = Counter()
        self._client = client
        self._load = load
        self._on_end = on_end

    async def send_at_a_time(self, bodies: Sequence[bytes], concurrency: int) -> None:
        """Keep so many under way until all have ended."""
        waiting = iter(bodies)

        async def send_on() -> None:
            for body in waiting:
                await self._send(body)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(bodies))):
                group.create_task(send_on())

    async def send_at_rate(
        self, bodies: Sequence[bytes], rate: float, drawn: random.Random
    ) -> None:
        """Send so many a second on the average, whatever has become of those before.

        The gaps are exponentially distributed, which makes the arrivals a Poisson process.
        """
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for body in bodies:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._send(body))
                due += drawn.expovariate(rate)

    async def _send(self, body: bytes) -> None:
        try:
            answer = await self._client.complete(body)
            self._check(answer)
        except AnswerError as error:
            self.failures[str(error)] += 1
        else:
            self.answers.append(answer)
        self._on_end()

    def _check(self, answer: Answer) -> None:
        usage, load = answer.usage, self._load
        if usage.generated_tokens != load.output_len:
            raise AnswerError(f"{usage.generated_tokens} tokens generated, not {load.output_len}")
        # how many tokens a text has is the server's to say
        if load.prompt_as == "ids" and usage.prompt_tokens != load.input_len:
            raise AnswerError(f"{usage.prompt_tokens} tokens of prompt read, not {load.input_len}")
        if not answer.token_times:
            raise AnswerError("no event with a token")
