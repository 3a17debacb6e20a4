"""``POST /v1/completions``: one stream of text deltas feeds both kinds of answer."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from engine.request import RequestError, RequestLimits
from server.admission import Admission
from server.engine_client import EngineClient
from server.errors import ApiError, EngineError
from server.metrics import Metrics, RequestClock
from server.schemas import CompletionRequest
from server.text_stream import TextDelta, TextStream
from weights.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What the routes share: one served model and the way to its engine."""

    model_name: str
    created: int
    tokenizer: Tokenizer
    limits: RequestLimits
    engine: EngineClient
    admission: Admission
    metrics: Metrics

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not the one served (ApiError, 404)."""
        if name is not None and name != self.model_name:
            message = f"model: {name!r} does not exist, this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


class Completion:
    """One request on its way: opened, then read once, as a stream or as a whole."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        """Check what can be checked without the tokenizer (ApiError, RequestError)."""
        service.check_model(body.model)
        self._service = service
        self._body = body
        self._sampling = body.sampling()
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompts: list[list[int]] = []
        self._num_tokens = 0

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece.

        Raises:
            ApiError: the queue is full, or the engine failed.
            RequestError: a prompt is not what the model can take.
        """
        choices: dict[int, list[TextDelta]] = {}
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                choices.setdefault(delta.index, []).append(delta)
        joined = [self._choice(_join(parts)) for _, parts in sorted(choices.items())]
        return self._object(joined) | {"usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. What fails before the first of them raises."""
        options = self._body.stream_options
        include_usage = options is not None and options.include_usage
        # with include_usage every chunk has the field, null but in the last
        usage = {"usage": None} if include_usage else {}
        started: set[int] = set()
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    choice = self._choice(delta, first=delta.index not in started)
                    started.add(delta.index)
                    yield _event(self._object([choice]) | usage)
            if include_usage:
                yield _event(self._object([]) | {"usage": self._usage()})
        except EngineError as error:
            if not started:
                raise
            yield _event(error.body)
        yield b"data: [DONE]\n\n"

    async def _deltas(self) -> AsyncGenerator[TextDelta, None]:
        service, body = self._service, self._body
        with service.admission.reserve(len(body.prompts)):
            self._prompts = [await self._encode(prompt) for prompt in body.prompts]
            for ids in self._prompts:
                service.limits.check(ids, self._sampling)
            texts = [self._text(index, ids) for index, ids in enumerate(self._prompts)]
            clocks = [RequestClock(service.metrics, len(ids)) for ids in self._prompts]
            stream = service.engine.submit(self._id, self._prompts, self._sampling)
            try:
                async for index, output in stream.outputs():
                    if output.finish_reason == "error":
                        clocks[index].finished("error")
                        logger.error("%s failed: %s", output.request_id, output.error)
                        raise EngineError(output.error or "the engine failed")
                    self._num_tokens += len(output.token_ids)
                    clocks[index].tokens(len(output.token_ids))
                    delta = texts[index].push(output)
                    if delta.finish_reason is not None:
                        clocks[index].finished(delta.finish_reason)
                        stream.end(index)
                    yield delta
            finally:
                stream.close()

    async def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        tokenizer, limit = self._service.tokenizer, self._service.limits.max_model_len
        if len(prompt) > limit * tokenizer.longest_token:
            message = f"has {len(prompt)} characters, more than {limit} tokens can have"
            raise RequestError("prompt", message)
        # a long text takes a while, in which the others' tokens should not wait
        return await asyncio.to_thread(tokenizer.encode, prompt, self._body.add_special_tokens)

    def _text(self, index: int, prompt_ids: Sequence[int]) -> TextStream:
        tokenizer, stop_ids = self._service.tokenizer, self._sampling.stop_token_ids
        return TextStream(index, tokenizer, prompt_ids, self._body.stop, stop_ids)

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_name,
            "choices": choices,
        }

    def _choice(self, delta: TextDelta, first: bool = True) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = self._prompts[delta.index] if first else None
        return choice

    def _usage(self) -> dict[str, int]:
        prompt_tokens = sum(map(len, self._prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": prompt_tokens + self._num_tokens,
        }


def _join(deltas: Sequence[TextDelta]) -> TextDelta:
    return TextDelta(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
