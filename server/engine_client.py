"""The engine process as the event loop sees it: streams of outputs, aborts, statistics."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from engine.process import Abort, EngineProcess
from engine.request import EngineStatistics, Request, SamplingParams, TokenOutput

logger = logging.getLogger(__name__)


class EngineClient:
    """Hands requests to a started engine process and outputs to those who wait for them."""

    def __init__(
        self, process: EngineProcess, on_statistics: Callable[[EngineStatistics], None]
    ) -> None:
        self._process = process
        self._on_statistics = on_statistics
        self._streams: dict[str, TokenStream] = {}
        self.is_alive = True

    def attach(self) -> None:
        """Listen to the process from the running event loop."""
        asyncio.get_running_loop().add_reader(self._process.fileno(), self.receive)

    def detach(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._process.fileno())

    def submit(
        self, name: str, prompts: Iterable[Sequence[int]], sampling: SamplingParams
    ) -> "TokenStream":
        """Start one request a prompt, called ``name`` and a number; close the stream after."""
        requests = [
            Request(f"{name}-{index}", tuple(ids), sampling) for index, ids in enumerate(prompts)
        ]
        stream = TokenStream([request.request_id for request in requests], self.abort)
        for request in requests:
            if self.is_alive:
                self._streams[request.request_id] = stream
                self._process.send(request)
            else:
                stream.put(_gone(request.request_id))
        return stream

    def abort(self, request_id: str) -> None:
        """Forget a request that nobody waits for any more."""
        if self._streams.pop(request_id, None) is not None:
            self._process.send(Abort(request_id))

    def end_all(self, error: str) -> None:
        """End every request under way with an error."""
        for request_id in list(self._streams):
            self._process.send(Abort(request_id))
            self._deliver(TokenOutput(request_id, finish_reason="error", error=error))

    def receive(self) -> None:
        """Take one step's output from the process and hand it on; called when it is readable."""
        try:
            step = self._process.receive()
        except EOFError:
            self._engine_died()
            return
        self._on_statistics(step.statistics)
        for output in step.outputs:
            self._deliver(output)

    def _deliver(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # aborted while this output was on its way
        if output.finish_reason is not None:
            del self._streams[output.request_id]
        stream.put(output)

    def _engine_died(self) -> None:
        logger.error("the engine process has ended; its requests end with errors")
        self.is_alive = False
        self.detach()
        self._on_statistics(EngineStatistics())
        for request_id in list(self._streams):
            self._deliver(_gone(request_id))


class TokenStream:
    """Outputs of a few requests, interleaved as they come: (index of the request, output)."""

    def __init__(self, request_ids: Sequence[str], abort: Callable[[str], None]) -> None:
        self._index = {request_id: index for index, request_id in enumerate(request_ids)}
        self._unfinished = set(request_ids)
        self._abort = abort
        self._outputs: asyncio.Queue[TokenOutput] = asyncio.Queue()

    def put(self, output: TokenOutput) -> None:
        """Hand an output to whoever iterates."""
        self._outputs.put_nowait(output)

    async def outputs(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """Every output until all requests have finished or were ended by ``end``."""
        while self._unfinished:
            output = await self._outputs.get()
            if output.request_id not in self._unfinished:
                continue
            if output.finish_reason is not None:
                self._unfinished.remove(output.request_id)
            yield self._index[output.request_id], output

    def end(self, index: int) -> None:
        """Abort one request; no more of its outputs come."""
        request_id = next(name for name, at in self._index.items() if at == index)
        if request_id in self._unfinished:
            self._unfinished.remove(request_id)
            self._abort(request_id)

    def close(self) -> None:
        """Abort whatever has not finished."""
        for request_id in self._unfinished:
            self._abort(request_id)
        self._unfinished = set()


def _gone(request_id: str) -> TokenOutput:
    return TokenOutput(request_id, finish_reason="error", error="the engine process has ended")
