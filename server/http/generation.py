"""Generates the answers of one HTTP request: admission, prompts, engine requests, text deltas."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from engine.errors import RequestError
from engine.request import PatchRef, Request, TokenOutput
from engine.sampling.grammar import Grammar
from server.http.admission import Place
from server.http.errors import ApiError, DeadlineError, EngineError
from server.http.generation_options import GenerationOptions
from server.http.metrics import RequestClock
from server.http.service import Service
from server.http.text_stream import TextDelta, TextOptions, TextStream
from server.request_id import engine_request_id
from server.token_stream import SlowReaderError, TokenStream
from weights.checkpoints.word_ids import word_ids

logger = logging.getLogger(__name__)
# more entries would block the event loop for seconds while they are written
MAX_PROMPT_LOGPROBS = 200_000

Ids = tuple[int, ...]


class Generation:
    """The answers of one request, one per sample of each prompt; read ``deltas`` once.

    Attributes:
        body: the request's options.
        request_id: the id of the response, and the prefix of the engine requests' ids.
        prompts: token ids of the prompts, once the first delta has come.
    """

    def __init__(
        self,
        service: Service,
        body: GenerationOptions,
        id_prefix: str,
        num_prompts: int,
        encode: Callable[[], Awaitable[list[Ids]]],
        grammar: Grammar | None = None,
        find_patches: Callable[[], tuple[PatchRef, ...]] = tuple,
    ) -> None:
        """Check everything that needs no tokenizer; ``encode`` makes the prompts' ids later.

        All answers follow ``grammar``. They use the row patches of ``find_patches``, which is
        called now to check them, and again when the requests are sent.

        Raises:
            ApiError: the engine is not running, or as ``find_patches``.
            RequestError: a sampling parameter is out of range, or as ``find_patches``.
        """
        find_patches()
        service.check_engine()
        if body.priority and not service.options.allow_priority:
            message = "only 0 is allowed; the server was started without --allow-priority"
            raise RequestError("priority", message)
        body.sampling(service.limits.max_model_len)
        self.body = body
        self.request_id = engine_request_id(id_prefix)
        self.prompts: list[Ids] = []
        self._service = service
        self._num_prompts = num_prompts
        self._encode = encode
        self._grammar = grammar
        self._find_patches = find_patches
        limits = (body.timeout or math.inf, service.options.request_timeout_s or math.inf)
        self._timeout_s = min(limits)
        self._start = asyncio.get_running_loop().time()
        self._num_tokens = 0
        self._cached_tokens = 0
        self._draft_tokens = self._accepted_tokens = 0

    async def deltas(self, place: Place) -> AsyncGenerator[list[TextDelta], None]:
        """The text deltas of all answers, in lists of those that arrived together.

        It enlarges ``place``, which belongs to the HTTP request, and gives back the share of each
        answer when the engine has ended it. Closing the generator aborts the request.

        Raises:
            ApiError: the queue is full, the engine failed, or the request took too long.
            RequestError: a prompt does not fit the model.
        """
        service, requests = self._service, await self._admitted_in_time(place)

        def ended(index: int) -> None:
            place.reduce("prompts", 1)
            place.reduce("tokens", _cost(requests[index]))

        texts = [
            TextStream(i, service.tokenizer, r.prompt_ids, r.sampling, self._text_options())
            for i, r in enumerate(requests)
        ]
        clocks = [RequestClock(service.metrics, len(r.prompt_ids)) for r in requests]
        stream = service.engine.submit(requests, ended)
        deadline = self._end_in_time(stream)
        finished: set[int] = set()
        try:
            async for outputs in stream.batches():
                deltas: list[TextDelta] = []
                for index, output in outputs:
                    if index in finished:
                        continue  # it came together with the end of a stop string
                    if output.finish_reason == "error":
                        if deltas:
                            yield deltas
                        clocks[index].finished("error")
                        finished.add(index)
                        raise _failure(output)
                    if not clocks[index].num_tokens:
                        self._cached_tokens += output.cached_tokens
                        clocks[index].started(output.queued_s)
                    self._draft_tokens += output.draft_tokens
                    self._accepted_tokens += output.accepted_tokens
                    delta = texts[index].push(output)
                    self._num_tokens += len(delta.token_ids)
                    clocks[index].tokens(len(delta.token_ids))
                    if delta.finish_reason is not None:
                        clocks[index].finished(delta.finish_reason)
                        stream.end(index)
                        finished.add(index)
                    deltas.append(delta)
                if deltas:
                    yield deltas
        except SlowReaderError as error:
            raise ApiError(408, str(error)) from None
        finally:
            if deadline is not None:
                deadline.cancel()
            stream.close()
            for index in set(range(len(clocks))) - finished:
                clocks[index].aborted()

    def usage(self, unsent: Sequence[TextDelta] = ()) -> dict[str, Any]:
        """OpenAI's usage object for the tokens so far, without those of ``unsent``."""
        prompt_tokens = sum(map(len, self.prompts))
        num_tokens = self._num_tokens - sum(len(delta.token_ids) for delta in unsent)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": prompt_tokens + num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self._accepted_tokens,
                "rejected_prediction_tokens": self._draft_tokens - self._accepted_tokens,
            },
        }

    async def _admitted_in_time(self, place: Place) -> list[Request]:
        end = None if self._timeout_s == math.inf else self._start + self._timeout_s
        try:
            async with asyncio.timeout_at(end):
                return await self._admitted(place)
        except TimeoutError:
            raise DeadlineError(self._timeout_s) from None

    async def _admitted(self, place: Place) -> list[Request]:
        """Enlarge the place before the prompts are encoded, and once their lengths are known."""
        count = self._num_prompts * self.body.num_samples
        place.enlarge("prompts", count)
        least = 1 + min(self.body.max_tokens or 0, self._service.limits.max_model_len)
        place.enlarge("tokens", count * least)
        self.prompts = await self._encode()
        requests = await self._requests()
        place.enlarge("tokens", sum(map(_cost, requests)))
        return requests

    async def _requests(self) -> list[Request]:
        """One engine request per sample of each prompt, in the order of the choices."""
        body, limits = self.body, self._service.limits
        if self._grammar is not None:
            await self._service.grammars.check(self._grammar)
        bad_words = await asyncio.to_thread(self._bad_words)
        # from here to the engine nothing awaits, so none of them can be removed on the way
        patches = self._find_patches()
        requests: list[Request] = []
        for ids in self.prompts:
            for sample in range(body.num_samples):
                sampling = body.sampling(limits.max_model_len - len(ids), bad_words, sample)
                if not sample:  # samples differ in their seeds alone
                    limits.check(ids, sampling)
                name = f"{self.request_id}-{len(requests)}"
                shared = body.priority, body.cache_salt, self._grammar, patches
                requests.append(Request(name, ids, sampling, *shared))
        _check_prompt_logprobs(requests)
        return requests

    def _bad_words(self) -> tuple[Ids, ...]:
        tokenizer = self._service.tokenizer
        found = (ids for word in self.body.bad_words for ids in word_ids(tokenizer, word))
        return tuple(dict.fromkeys(map(tuple, found)))

    def _end_in_time(self, stream: TokenStream) -> asyncio.TimerHandle | None:
        """End the stream with an error when the request's time is over."""
        if self._timeout_s == math.inf:
            return None
        error = DeadlineError(self._timeout_s)
        loop = asyncio.get_running_loop()
        return loop.call_at(self._start + self._timeout_s, stream.fail, error)

    def _text_options(self) -> TextOptions:
        body = self.body
        return TextOptions(body.stop, body.include_stop_str_in_output, not body.skip_special_tokens)


def _cost(request: Request) -> int:
    """The number of tokens that the request can need."""
    return len(request.prompt_ids) + request.sampling.max_tokens


def _check_prompt_logprobs(requests: Sequence[Request]) -> None:
    scored = [r for r in requests if r.sampling.prompt_logprobs is not None]
    entries = sum(len(r.prompt_ids) * (r.sampling.prompt_logprobs or 1) for r in scored)
    if entries > MAX_PROMPT_LOGPROBS:
        message = f"at most {MAX_PROMPT_LOGPROBS} entries over all samples, not {entries}"
        raise RequestError("prompt_logprobs", message)


def _failure(output: TokenOutput) -> ApiError:
    """The error of a request that ended with one: the caller's mistake, or the engine's failure.

    Only a failure is logged: a mistake's message can quote the request.
    """
    message = output.error or "the engine failed"
    if output.error_param is not None:
        return ApiError(400, message, param=output.error_param)
    logger.error("%s failed: %s", output.request_id, output.error)
    return EngineError(message)
