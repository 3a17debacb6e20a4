"""Streams of engine outputs, with a bound on the outputs that nobody has read yet."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from engine.request import TokenOutput

# tokens and log-probabilities that wait for readers, over all streams: about 200 MB
MAX_UNREAD = 1_000_000
# outputs of one request that are merged, because their reader cannot keep up
_MANY = 32


class SlowReaderError(Exception):
    """The stream was ended because its outputs were not read."""


class UnreadOutputs:
    """The outputs that wait for readers; ends the stream with the most if there are too many.

    A slow reader costs its own stream a few bytes per token, until its request ends at its
    ``max_tokens``. So the engine need not pause, and no other request waits for the reader.
    """

    def __init__(self, limit: int = MAX_UNREAD) -> None:
        self._limit = limit
        self._total = 0
        self._streams: dict[TokenStream, int] = {}

    def add(self, stream: "TokenStream", weight: int) -> None:
        """Count outputs that were added to a stream."""
        self._streams[stream] = self._streams.get(stream, 0) + weight
        self._total += weight
        while self._total > self._limit:
            slowest = max(self._streams, key=lambda stream: self._streams[stream])
            slowest.fail(SlowReaderError("the client reads the answer too slowly"), drop=True)

    def clear(self, stream: "TokenStream") -> None:
        """Count that a stream has no unread outputs."""
        self._total -= self._streams.pop(stream, 0)


class TokenStream:
    """The outputs of one or more requests, for one reader."""

    def __init__(
        self,
        request_ids: Sequence[str],
        abort: Callable[[str], None],
        on_end: Callable[[int], None],
        unread: UnreadOutputs,
    ) -> None:
        """``abort`` cancels a request of the engine; ``on_end`` gets the index of a request as soon
        as the engine needs no more for it, even if its outputs are not read."""
        self._running = {request_id: index for index, request_id in enumerate(request_ids)}
        self._request_ids = tuple(request_ids)
        self._abort = abort
        self._on_end = on_end
        self._unread = unread
        self._outputs: dict[int, list[TokenOutput]] = {}
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        """Add an output to the stream; it is dropped if its request was ended here."""
        index = self._running.get(output.request_id)
        if index is None:
            return
        if output.finish_reason is not None:
            del self._running[output.request_id]
            self._on_end(index)
        self._outputs.setdefault(index, []).append(output)
        self._news.set()
        self._unread.add(self, _weight(output))

    async def batches(self) -> AsyncIterator[list[tuple[int, TokenOutput]]]:
        """Whatever has arrived, as (request index, output), until all requests have ended.

        If the reader is slow, the outputs of a request come merged into one.

        Raises:
            Exception: the one that ``fail`` was given, after the outputs before it.
        """
        while True:
            if self._outputs:
                taken, self._outputs = self._outputs, {}
                self._unread.clear(self)
                yield [(i, output) for i, outputs in taken.items() for output in _merged(outputs)]
            elif self._error is not None:
                raise self._error
            elif not self._running:
                return
            else:
                self._news.clear()
                await self._news.wait()

    def end(self, index: int) -> None:
        """Abort one request and drop its further outputs."""
        request_id = self._request_ids[index]
        if request_id in self._running:
            del self._running[request_id]
            self._abort(request_id)
            self._on_end(index)
        self._outputs.pop(index, None)

    def fail(self, error: Exception, drop: bool = False) -> None:
        """Abort all requests, then let the reader raise ``error``; ``drop`` drops the outputs."""
        if not self._running and not drop:
            return  # the answer is whole
        for index in list(self._running.values()):
            self._abort(self._request_ids[index])
            self._on_end(index)
        self._running.clear()
        if drop:
            self._outputs.clear()
            self._unread.clear(self)
        self._error = error
        self._news.set()

    def close(self) -> None:
        """Abort all unfinished requests, and drop everything."""
        for request_id in self._running:
            self._abort(request_id)
        self._running.clear()
        self._outputs.clear()
        self._unread.clear(self)


def _weight(output: TokenOutput) -> int:
    entries = output.logprobs + output.prompt_logprobs
    rows = sum(len(read.rows) for reads in output.memory_reads for read in reads)
    return 1 + len(output.token_ids) + sum(1 + len(entry.top) for entry in entries) + rows


def _merged(outputs: list[TokenOutput]) -> list[TokenOutput]:
    """Many outputs of one request as one, for a reader that is slow; an error stays apart."""
    if len(outputs) < _MANY:
        return outputs
    errors = [output for output in outputs[-1:] if output.finish_reason == "error"]
    successful = outputs[: len(outputs) - len(errors)]
    whole = successful[-1]._replace(
        token_ids=tuple(i for output in successful for i in output.token_ids),
        logprobs=tuple(entry for output in successful for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in successful for entry in output.prompt_logprobs),
        memory_reads=tuple(reads for output in successful for reads in output.memory_reads),
        cached_tokens=successful[0].cached_tokens,
        draft_tokens=sum(output.draft_tokens for output in successful),
        accepted_tokens=sum(output.accepted_tokens for output in successful),
    )
    return [whole, *errors]
