"""``POST /v1/completions``: plain and streamed responses from one stream of text deltas."""

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from engine.errors import RequestError
from engine.request import Request
from server.http.choice import ChoiceWriter
from server.http.errors import EngineError
from server.http.metrics import RequestClock
from server.http.schemas import CompletionRequest
from server.http.service import Service
from server.http.text_stream import TextDelta, TextOptions, TextStream

logger = logging.getLogger(__name__)
# more entries would block the event loop for seconds while they are written
MAX_PROMPT_LOGPROBS = 200_000


class Completion:
    """One completion request; read its answer once, by ``whole`` or by ``events``."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        """Check everything that needs no tokenizer (raises ApiError, RequestError)."""
        service.check_model(body.model)
        service.check_engine()
        body.sampling((), 0)
        self._service = service
        self._body = body
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompts: list[list[int]] = []
        self._num_tokens = 0
        self._cached_tokens = 0

    async def whole(self) -> dict[str, Any]:
        """The whole answer as one JSON object.

        Raises:
            ApiError: the queue is full, or the engine failed.
            RequestError: a prompt does not fit the model.
        """
        parts: dict[int, list[TextDelta]] = {}
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                parts.setdefault(delta.index, []).append(delta)
        joined = [_join(parts[index]) for index in sorted(parts)]
        choices = []
        for index, delta in enumerate(self._best(joined)):
            writer = self._writer(delta.index)
            choices.append(writer.write(delta) | {"index": index})
        return self._object(choices) | {"usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. Errors before the first event raise, as ``whole``."""
        options = self._body.stream_options
        include_usage = options is not None and options.include_usage
        every_usage = options is not None and options.continuous_usage_stats
        writers: dict[int, ChoiceWriter] = {}
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    if delta.index not in writers:
                        writers[delta.index] = self._writer(delta.index)
                    chunk = self._object([writers[delta.index].write(delta)])
                    if include_usage or every_usage:
                        # with include_usage every chunk has the field, null except in the last
                        chunk["usage"] = self._usage() if every_usage else None
                    yield _event(chunk)
            if include_usage:
                yield _event(self._object([]) | {"usage": self._usage()})
        except EngineError as error:
            if not writers:
                raise
            yield _event(error.body)
        yield b"data: [DONE]\n\n"

    async def _deltas(self) -> AsyncGenerator[TextDelta, None]:
        service, body = self._service, self._body
        samples = body.num_samples
        with service.admission.reserve(len(body.prompts) * samples):
            self._prompts = [await self._prompt_ids(prompt) for prompt in body.prompts]
            requests = await self._requests()
            texts = [
                TextStream(i, service.tokenizer, r.prompt_ids, r.sampling, self._text_options())
                for i, r in enumerate(requests)
            ]
            clocks = [RequestClock(service.metrics, len(r.prompt_ids)) for r in requests]
            stream = service.engine.submit(requests)
            started: set[int] = set()
            try:
                async for index, output in stream.outputs():
                    if output.finish_reason == "error":
                        clocks[index].finished("error")
                        logger.error("%s failed: %s", output.request_id, output.error)
                        raise EngineError(output.error or "the engine failed")
                    if index not in started:
                        started.add(index)
                        self._cached_tokens += output.cached_tokens
                    delta = texts[index].push(output)
                    self._num_tokens += len(delta.token_ids)
                    clocks[index].tokens(len(delta.token_ids))
                    if delta.finish_reason is not None:
                        clocks[index].finished(delta.finish_reason)
                        stream.end(index)
                    yield delta
            finally:
                stream.close()

    async def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        body, service = self._body, self._service
        keep = body.truncate_prompt_tokens
        ids = prompt
        if isinstance(ids, str):
            ids = await service.encode(ids, body.add_special_tokens, only_end=keep is not None)
        if keep is not None:
            most = service.limits.max_model_len - body.sampling((), 0).max_tokens
            keep = max(most, 1) if keep == -1 else keep
            ids = ids[-keep:]
        return ids

    async def _requests(self) -> list[Request]:
        """One engine request per sample of each prompt, in the order of the choices."""
        body, service = self._body, self._service
        bad_words = []
        for word in body.bad_words:
            # the word at the beginning of a line, and the word after a space
            for text in (word, f" {word.lstrip()}"):
                bad_words.append(tuple(await service.encode(text, add_special_tokens=False)))
        requests: list[Request] = []
        for ids in self._prompts:
            for sample in range(body.num_samples):
                sampling = body.sampling(tuple(dict.fromkeys(bad_words)), sample)
                service.limits.check(ids, sampling)
                name = f"{self._id}-{len(requests)}"
                requests.append(Request(name, tuple(ids), sampling, body.priority, body.cache_salt))
        scored = [r for r in requests if r.sampling.prompt_logprobs is not None]
        entries = sum(len(r.prompt_ids) * (r.sampling.prompt_logprobs or 1) for r in scored)
        if entries > MAX_PROMPT_LOGPROBS:
            message = f"at most {MAX_PROMPT_LOGPROBS} entries over all samples, not {entries}"
            raise RequestError("prompt_logprobs", message)
        return requests

    def _text_options(self) -> TextOptions:
        body = self._body
        return TextOptions(body.stop, body.include_stop_str_in_output, not body.skip_special_tokens)

    def _best(self, choices: list[TextDelta]) -> list[TextDelta]:
        """The ``n`` choices of each prompt with the highest mean log-probability per token."""
        samples, n = self._body.num_samples, self._body.n
        if samples == n:
            return choices
        best: list[TextDelta] = []
        for start in range(0, len(choices), samples):
            ranked = sorted(choices[start : start + samples], key=_mean_logprob, reverse=True)
            best += ranked[:n]
        return best

    def _writer(self, index: int) -> ChoiceWriter:
        prompt = index // self._body.num_samples
        given = self._body.prompts[prompt]
        return ChoiceWriter(
            self._service.tokenizer,
            self._body,
            self._prompts[prompt],
            # echo a text prompt as it was sent, unless it was truncated
            given if isinstance(given, str) and not self._body.truncate_prompt_tokens else None,
        )

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_name,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        prompt_tokens = sum(map(len, self._prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
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
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
