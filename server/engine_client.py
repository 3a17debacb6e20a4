"""The engine process as the event loop sees it: streams of outputs, aborts, and its whole life."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from engine.process import PAUSE_S, Abort, EngineProcess, EngineStartError, Heartbeat
from engine.request import EngineStatistics, Request, StepOutput, TokenOutput
from server.config import SupervisionOptions

logger = logging.getLogger(__name__)
WATCH_EVERY_S = 0.5
_RESTART_PAUSE_S = 1.0


class EngineClient:
    """Hands requests to an engine process and outputs to those who wait for them.

    It notices when the process dies or hangs, ends the requests that were there with errors, and
    starts another where it may.

    Attributes:
        is_alive: whether the engine takes requests.
        is_lost: whether it never will again: it has ended and no restarts are left.
    """

    def __init__(
        self,
        process: EngineProcess,
        on_statistics: Callable[[EngineStatistics], None],
        supervision: SupervisionOptions,
        make_process: Callable[[], EngineProcess],
    ) -> None:
        """Take over a started ``process``; ``make_process`` makes those that follow it."""
        self._process = process
        self._on_statistics = on_statistics
        self._supervision = supervision
        self._make_process = make_process
        self._restarts_left = supervision.engine_restarts
        self._streams: dict[str, TokenStream] = {}
        self._last_progress = time.monotonic()
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_alive = True
        self.is_lost = False
        self.lost_tables: tuple[str, ...] = ()

    def attach(self) -> None:
        """Listen to the process, and watch it, from the running event loop."""
        self._listen()
        self._begin(self._watch())

    async def detach(self) -> None:
        """Stop watching; an engine that was being started is stopped."""
        self._is_closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if not self.is_alive:
            await asyncio.to_thread(self._process.stop)
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """End the process that is there now."""
        self._is_closing = True
        self._process.stop()

    def submit(self, requests: Sequence[Request]) -> "TokenStream":
        """Start requests, whose outputs come in one stream; the caller must close it."""
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

    def handle(self, output: StepOutput) -> None:
        """Deal out what a step gave; its tokens first, which someone waits for."""
        self.lost_tables = output.statistics.lost_tables
        for token_output in output.outputs:
            self._deliver(token_output)
        self._on_statistics(output.statistics)

    def _handle_from(self, process: EngineProcess, output: StepOutput) -> None:
        """Deal out what a process says, unless it was given up: its totals were closed then."""
        if process is self._process and self.is_alive:
            self.handle(output)

    def _deliver(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # aborted while this output was on its way
        if output.finish_reason is not None:
            del self._streams[output.request_id]
        stream.put(output)

    def _listen(self) -> None:
        """Read the process's messages in a thread and handle them in the event loop."""
        loop, process = asyncio.get_running_loop(), self._process
        self._last_progress = time.monotonic()

        def read() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed before the process ended
                while True:
                    try:
                        message = process.receive()
                    except EOFError:
                        loop.call_soon_threadsafe(self._engine_died, process)
                        return
                    if process is not self._process:
                        continue  # what is left in its pipe is no sign of its successor's life
                    # noted here, so that a busy loop does not take itself for a silent engine
                    self._last_progress = time.monotonic()
                    if isinstance(message, Heartbeat):
                        self._last_progress -= message.stalled_s
                    else:
                        loop.call_soon_threadsafe(self._handle_from, process, message)

        threading.Thread(target=read, name="engine-reader", daemon=True).start()

    async def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            last, looked = looked, time.monotonic()
            if looked - last > WATCH_EVERY_S + PAUSE_S:
                self._last_progress = looked  # signs of life may be there, but were not read yet
            stalled_s = looked - self._last_progress
            if self.is_alive and stalled_s > self._supervision.stall_timeout_s:
                logger.error(
                    "the engine process made no progress for %.1f s beyond what its work may take"
                    " and is killed; if it is only slow, raise --stall-timeout-s",
                    stalled_s,
                )
                self._process.kill()
                self._engine_died(self._process)

    def _engine_died(self, process: EngineProcess) -> None:
        if self._is_closing or process is not self._process or not self.is_alive:
            return
        logger.error("the engine process has ended; its requests end with errors")
        self.is_alive = False
        self.lost_tables = ()  # the next process opens them anew
        self._on_statistics(EngineStatistics())
        for request_id in list(self._streams):
            self._deliver(_gone(request_id))
        self._begin(self._restart(process))

    async def _restart(self, dead: EngineProcess) -> None:
        await asyncio.to_thread(dead.stop)
        while self._restarts_left and not self._is_closing:
            self._restarts_left -= 1
            self._process = self._make_process()
            try:
                await asyncio.to_thread(self._process.start)
            except (EngineStartError, OSError) as error:
                logger.error("the engine could not be started again: %s", error)
                await asyncio.sleep(_RESTART_PAUSE_S)
                continue
            self.is_alive = True
            self._listen()
            logger.warning("the engine runs again; %d restarts are left", self._restarts_left)
            return
        self.is_lost = not self._is_closing

    def _begin(self, work: "asyncio._CoroutineLike[None]") -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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
