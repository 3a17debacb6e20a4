"""Writes a generation as one JSON object or as server-sent events."""

import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from server.http.errors import EngineError
from server.http.generation import Generation
from server.http.text_stream import TextDelta


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
    ) -> None:
        """``kinds`` are the object's names, whole and streamed; ``make_writer`` takes the index
        of a prompt."""
        self._generation = generation
        self._model_name = model_name
        self._kinds = kinds
        self._make_writer = make_writer
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The whole answer as one JSON object.

        Raises:
            ApiError, RequestError: as ``Generation.deltas``.
        """
        parts: dict[int, list[TextDelta]] = {}
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                parts.setdefault(delta.index, []).append(delta)
        joined = [_join(parts[index]) for index in sorted(parts)]
        choices = [
            self._writer(delta.index).whole(delta) | {"index": index}
            for index, delta in enumerate(self._best(joined))
        ]
        return self._object(self._kinds[0], choices) | {"usage": self._generation.usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. Errors before the first event raise, as ``whole``."""
        options = self._generation.body.stream_options
        include_usage = options is not None and options.include_usage
        every_usage = options is not None and options.continuous_usage_stats
        kind = self._kinds[1]
        writers: dict[int, ChoiceWriter] = {}
        try:
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    if delta.index not in writers:
                        writers[delta.index] = self._writer(delta.index)
                    chunk = self._object(kind, [writers[delta.index].chunk(delta)])
                    if include_usage or every_usage:
                        # with include_usage every chunk has the field, null except in the last
                        chunk["usage"] = self._generation.usage() if every_usage else None
                    yield _event(chunk)
            if include_usage:
                yield _event(self._object(kind, []) | {"usage": self._generation.usage()})
        except EngineError as error:
            if not writers:
                raise
            yield _event(error.body)
        yield b"data: [DONE]\n\n"

    def _best(self, choices: list[TextDelta]) -> list[TextDelta]:
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

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._generation.request_id,
            "object": kind,
            "created": self._created,
            "model": self._model_name,
            "choices": choices,
        }


def _mean_logprob(delta: TextDelta) -> float:
    return sum(entry.logprob for entry in delta.logprobs) / max(len(delta.logprobs), 1)


def _join(deltas: Sequence[TextDelta]) -> TextDelta:
    return TextDelta(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=deltas[0].prompt_logprobs,
        memory_reads=tuple(reads for delta in deltas for reads in delta.memory_reads),
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
