"""The event loop's client of the engine process: output streams, aborts, watchdog, restarts."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.messages import Abort, DescribeMemory, Heartbeat, MemoryReport, PatchLoaded
from engine.process import PAUSE_S, EngineLostError, EngineProcess, EngineStartError
from engine.request import EngineStatistics, PatchSummary, Request, StepOutput, TokenOutput
from server.config import SupervisionOptions
from server.engine_patches import EnginePatches
from server.token_stream import TokenStream, UnreadOutputs

logger = logging.getLogger(__name__)
WATCH_EVERY_S = 0.5
_RESTART_PAUSE_S = 1.0


class EngineClient:
    """Sends requests to an engine process and delivers the outputs to their streams.

    If the process dies or hangs, its requests fail with errors. The client then starts a new
    process while restarts are left, which loads the row patches again before it accepts requests.

    Attributes:
        is_alive: whether the engine accepts requests.
        is_lost: whether the engine has died for good, with no restarts left.
        lost_tables: the value tables that can no longer be read, with the reason.
        on_patch_lost: called with the content hash of each row patch that a new process cannot
            load again, because its folders are gone or have changed.
    """

    def __init__(
        self,
        process: EngineProcess,
        on_statistics: Callable[[EngineStatistics], None],
        supervision: SupervisionOptions,
        make_process: Callable[[], EngineProcess],
    ) -> None:
        """Take over a started ``process``; ``make_process`` makes its replacements."""
        self._process = process
        self._on_statistics = on_statistics
        self._supervision = supervision
        self._make_process = make_process
        self._restarts_left = supervision.engine_restarts
        self._streams: dict[str, TokenStream] = {}
        self._unread = UnreadOutputs()
        self._last_progress = time.monotonic()
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._report: asyncio.Future[MemoryReport] | None = None
        self._patches = EnginePatches(lambda message: self._process.send(message))
        self._is_running = True  # the process answers, though it may not accept requests yet
        self.is_alive = True
        self.is_lost = False
        self.lost_tables: tuple[str, ...] = ()
        self.on_patch_lost: Callable[[str], None] = lambda content_hash: None

    def attach(self) -> None:
        """Start to read from the process and to watch it, in the running event loop."""
        self._listen()
        self._spawn(self._watch())

    async def detach(self) -> None:
        """Stop the watchdog, and a restart that is under way."""
        self._is_closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if not self.is_alive:
            await asyncio.to_thread(self._process.stop)
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """End the current process."""
        self._is_closing = True
        self._process.stop()

    def submit(
        self, requests: Sequence[Request], on_end: Callable[[int], None] = lambda index: None
    ) -> TokenStream:
        """Send requests; one stream carries their outputs, and the caller must close it.

        ``on_end`` gets the index of each request as soon as the engine is done with it.
        """
        names = [request.request_id for request in requests]
        stream = TokenStream(names, self.abort, on_end, self._unread)
        if self.is_alive:
            self._streams |= dict.fromkeys(names, stream)
            self._process.send(*requests)
        else:
            for name in names:
                stream.put(_died_output(name))
        return stream

    def abort(self, request_id: str) -> None:
        """Abort a request whose outputs are no longer needed."""
        if self._streams.pop(request_id, None) is not None:
            self._process.send(Abort(request_id))

    def end_all(self, error: str) -> None:
        """End every request in flight with an error."""
        for request_id in list(self._streams):
            self._process.send(Abort(request_id))
            self._deliver(TokenOutput(request_id, finish_reason="error", error=error))

    async def memory_report(self) -> MemoryReport:
        """The engine's report on its value tables; concurrent callers share one.

        Raises:
            EngineLostError: the engine is not running, or dies before it answers.
        """
        if not self.is_alive:
            raise EngineLostError("the engine is not running")
        if self._report is None:
            self._report = asyncio.get_running_loop().create_future()
            self._process.send(DescribeMemory())
        # a caller that leaves must not cancel the others' future
        return await asyncio.shield(self._report)

    async def load_patch(self, folder: Path) -> PatchSummary:
        """Load the row patch in a folder, whose last component must not be a symbolic link.

        Raises:
            EngineLostError: the engine is not running, or dies before it answers.
            PatchBusyError: removed patches that requests still use take the memory that it needs.
            PatchFailedError: the patch could not be loaded now, but may be valid.
            PatchRefusedError: the patch is invalid, not made for this model, or exceeds a limit.
        """
        if not self.is_alive:
            raise EngineLostError("the engine is not running")
        return await self._patches.load(folder)

    def unload_patch(self, content_hash: str, folder: Path) -> None:
        """Take back one load of a patch. After the last one of a content, the engine refuses the
        patch to new requests; those that use it finish with it."""
        self._patches.unload(content_hash, folder)

    def handle(self, output: StepOutput) -> None:
        """Deliver a step's outputs; tokens come first, because clients wait for them."""
        self.lost_tables = output.statistics.lost_tables
        for token_output in output.outputs:
            self._deliver(token_output)
        self._on_statistics(output.statistics)

    def _handle_from(
        self, process: EngineProcess, message: StepOutput | MemoryReport | PatchLoaded
    ) -> None:
        """Handle a message, unless its process was replaced: its totals are already closed."""
        if process is not self._process or not self._is_running:
            return
        if isinstance(message, PatchLoaded):
            self._patches.answer(message)
        elif not self.is_alive:
            return  # of a process that still loads row patches
        elif isinstance(message, StepOutput):
            self.handle(message)
        elif self._report is not None:
            self._report.set_result(message)
            self._report = None

    def _deliver(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # aborted while this output was on its way
        if output.finish_reason is not None:
            del self._streams[output.request_id]
        stream.put(output)

    def _listen(self) -> None:
        """Read the process's messages in a thread, and handle them in the event loop."""
        loop, process = asyncio.get_running_loop(), self._process
        self._is_running = True
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
                        continue  # old messages do not show that the new process lives
                    # set in this thread, so that a busy event loop does not look like a stall
                    self._last_progress = time.monotonic()
                    if isinstance(message, Heartbeat):
                        self._last_progress -= message.stalled_s
                    else:
                        loop.call_soon_threadsafe(self._handle_from, process, message)

        threading.Thread(target=read, name="engine-reader", daemon=True).start()

    async def _watch(self) -> None:
        now = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            last, now = now, time.monotonic()
            if now - last > WATCH_EVERY_S + PAUSE_S:
                self._last_progress = now  # this process was paused; heartbeats may be unread
            stalled_s = now - self._last_progress
            if self._is_running and stalled_s > self._supervision.stall_timeout_s:
                logger.error(
                    "killing the engine process: no progress for %.1f s beyond the time that its"
                    " work may take; if it is only slow, raise --stall-timeout-s",
                    stalled_s,
                )
                self._process.kill()
                self._engine_died(self._process)

    def _engine_died(self, process: EngineProcess) -> None:
        if self._is_closing or process is not self._process or not self._is_running:
            return
        logger.error("the engine process has died; its requests fail with errors")
        self._is_running = False
        self._patches.engine_died()
        if not self.is_alive:
            return  # it died while it loaded row patches: the restart goes on
        self.is_alive = False
        self.lost_tables = ()  # the next process opens the tables again
        self._on_statistics(EngineStatistics())
        for request_id in list(self._streams):
            self._deliver(_died_output(request_id))
        if self._report is not None:
            self._report.set_exception(EngineLostError("the engine process has died"))
            self._report = None
        self._spawn(self._restart(process))

    async def _restart(self, dead: EngineProcess) -> None:
        await asyncio.to_thread(dead.stop)
        while self._restarts_left and not self._is_closing:
            self._restarts_left -= 1
            self._process = self._make_process()
            try:
                await asyncio.to_thread(self._process.start)
                self._listen()
                await self._patches.reload(self.on_patch_lost)
            except (EngineStartError, EngineLostError, OSError) as error:
                logger.error("restart of the engine failed: %s", error)
                await asyncio.to_thread(self._process.stop)
                await asyncio.sleep(_RESTART_PAUSE_S)
                continue
            self.is_alive = True
            logger.warning("the engine was restarted; %d restarts are left", self._restarts_left)
            return
        self.is_lost = not self._is_closing

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _died_output(request_id: str) -> TokenOutput:
    return TokenOutput(request_id, finish_reason="error", error="the engine process has died")
