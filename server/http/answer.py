"""Writes a generation as one JSON object or as server-sent events."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from server.http.admission import Place
from server.http.errors import ApiError
from server.http.generation import Generation
from server.http.json_text import event, json_text, large_json_text
from server.http.text_stream import TextDelta

# tokens and log-probabilities; more are written in a thread, so that other answers continue
_LARGE = 1000
# bytes of events that are sent together
_MAX_TOGETHER = 65536


class ChoiceWriter(Protocol):
    """Writes the JSON objects of one choice in the format of a route."""

    def whole(self, delta: TextDelta) -> dict[str, Any]:
        """The choice of a response that is not streamed; ``delta`` has everything."""
        ...

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        """The choice of the next chunk of a stream."""
        ...


class Answer:
    """The response to one request; read it once, by ``whole`` or by ``events``."""

    def __init__(
        self,
        generation: Generation,
        model_name: str,
        kinds: tuple[str, str],
        make_writer: Callable[[int], ChoiceWriter],
        prompt_fields: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """``kinds`` are the object's names, whole and streamed; ``make_writer`` takes the index
        of a prompt. ``prompt_fields`` gives the fields next to ``choices`` that depend on the
        prompt; only the first chunk of a stream has them."""
        self._generation = generation
        self._model_name = model_name
        self._kinds = kinds
        self._make_writer = make_writer
        self._prompt_fields = prompt_fields
        self._created = int(time.time())

    async def whole(self, place: Place) -> bytes:
        """The whole answer as one JSON object, for a request that holds ``place``.

        Raises:
            ApiError, RequestError: as ``Generation.deltas``.
        """
        parts: dict[int, list[TextDelta]] = {}
        async with aclosing(self._generation.deltas(place)) as batches:
            async for deltas in batches:
                for delta in deltas:
                    parts.setdefault(delta.index, []).append(delta)
        joined = [_join(parts[index]) for index in sorted(parts)]
        if sum(map(self._weight, joined)) > _LARGE:
            return await asyncio.to_thread(self._written, joined, large_json_text)
        return self._written(joined, json_text)

    async def events(self, place: Place) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; what arrives together is sent together.

        Errors before the first event raise, as ``whole``.
        """
        options = self._generation.body.stream_options
        include_usage = options is not None and options.include_usage
        every_usage = options is not None and options.continuous_usage_stats
        head = json_text(self._object(self._kinds[1]))[:-1]
        writers: dict[int, ChoiceWriter] = {}

        def chunk(choices: str, usage: dict[str, Any] | None, prompt: str = "") -> bytes:
            # with include_usage every chunk has the field, null except in the last
            has_usage = usage is not None or include_usage
            end = f',"usage":{json_text(usage)}' if has_usage else ""
            return event(f'{head}{prompt},"choices":[{choices}]{end}}}')

        try:
            async with aclosing(self._generation.deltas(place)) as batches:
                async for deltas in batches:
                    together = b""
                    for count, delta in enumerate(deltas, 1):
                        prompt = "" if writers else await self._prompt_text()
                        choices = await self._choice(delta, writers)
                        usage = self._generation.usage(deltas[count:]) if every_usage else None
                        together += chunk(choices, usage, prompt)
                        if len(together) > _MAX_TOGETHER:
                            yield together
                            together = b""
                    if together:
                        yield together
            if include_usage:
                yield chunk("", self._generation.usage())
        except ApiError as error:
            if not writers:
                raise
            yield event(json_text(error.body))
        yield event("[DONE]")

    async def _prompt_text(self) -> str:
        """The JSON of the prompt's fields, to be inserted into an object."""
        fields = self._prompt_fields()
        if not fields:
            return ""
        return "," + (await asyncio.to_thread(large_json_text, fields))[1:-1]

    async def _choice(self, delta: TextDelta, writers: dict[int, ChoiceWriter]) -> str:
        """The JSON of the next chunk of a choice."""
        writer, weight = writers.get(delta.index), len(delta.token_ids)
        if writer is None:
            writer = writers[delta.index] = self._writer(delta.index)
            weight = self._weight(delta)
        if weight > _LARGE:
            write = writer.chunk
            return await asyncio.to_thread(lambda: large_json_text(write(delta)))
        return json_text(writer.chunk(delta))

    def _weight(self, delta: TextDelta) -> int:
        """About the number of tokens and log-probabilities to write, the prompt's included."""
        prompt = self._generation.prompts[delta.index // self._generation.body.num_samples]
        entries = delta.logprobs + delta.prompt_logprobs
        return len(prompt) + len(delta.token_ids) + sum(len(entry.top) for entry in entries)

    def _written(self, joined: Sequence[TextDelta], text: Callable[[Any], str]) -> bytes:
        choices = [
            self._writer(delta.index).whole(delta) | {"index": index}
            for index, delta in enumerate(self._best(joined))
        ]
        body = self._object(self._kinds[0]) | self._prompt_fields()
        return text(body | {"choices": choices, "usage": self._generation.usage()}).encode()

    def _best(self, choices: Sequence[TextDelta]) -> Sequence[TextDelta]:
        """The ``n`` choices of each prompt with the highest mean log-probability per token."""
        samples, n = self._generation.body.num_samples, self._generation.body.n
        if samples == n:
            return choices
        best: list[TextDelta] = []
        for start in range(0, len(choices), samples):
            ranked = sorted(choices[start : start + samples], key=_mean_logprob, reverse=True)
            best += ranked[:n]
        return best

    def _writer(self, index: int) -> ChoiceWriter:
        return self._make_writer(index // self._generation.body.num_samples)

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._generation.request_id,
            "object": kind,
            "created": self._created,
            "model": self._model_name,
        }


def _mean_logprob(delta: TextDelta) -> float:
    return sum(entry.logprob for entry in delta.logprobs) / max(len(delta.logprobs), 1)


def _join(deltas: Sequence[TextDelta]) -> TextDelta:
    return TextDelta(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        memory_reads=tuple(reads for delta in deltas for reads in delta.memory_reads),
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
