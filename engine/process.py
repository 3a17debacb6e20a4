"""Runs the engine in a child process: messages, the loop inside, the handle outside.

The parent never imports torch: the child builds the engine, by an entry function named as a string.
"""

import contextlib
import importlib
import logging
import multiprocessing
import queue
import threading
import time
from multiprocessing.connection import Connection
from typing import Protocol

from engine.errors import RequestError
from engine.messages import (
    Abort,
    DescribeMemory,
    EngineReady,
    EngineRefused,
    Heartbeat,
    LoadPatch,
    MemoryReport,
    Message,
    PatchLoaded,
    UnloadPatch,
)
from engine.patch_loading import PatchEngine, PatchLoading
from engine.progress import Progress
from engine.request import (
    EngineStatistics,
    Request,
    RequestLimits,
    StepOutput,
    TableReport,
    TokenOutput,
    refused_output,
)
from engine.shielded_start import start_shielded

logger = logging.getLogger(__name__)
# seconds between two heartbeats of the engine process
HEARTBEAT_S = 0.5
# if a wait takes this much longer than asked, the process itself was stopped
PAUSE_S = 1.0
# seconds for an engine without requests to end by itself
STOP_S = 1.0

# messages from a running engine process
Answer = StepOutput | Heartbeat | MemoryReport | PatchLoaded


class StepEngine(PatchEngine, Protocol):
    """The part of ``engine.engine.Engine`` that the loop calls."""

    limits: RequestLimits

    @property
    def progress(self) -> Progress: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> StepOutput: ...
    def statistics(self) -> EngineStatistics: ...
    def memory_report(self) -> tuple[TableReport, ...]: ...
    def check_idle(self) -> None: ...


class EngineStartError(Exception):
    """The engine process could not start; this class itself: its settings or model are wrong."""


class EngineFailedError(EngineStartError):
    """The machine failed while the engine started: it lacks memory, or the process died."""


class EngineLostError(Exception):
    """The engine process has ended, and it may not be restarted again."""


class EngineProcess:
    """The parent's handle on the engine process. ``send`` never blocks; ``receive`` may."""

    def __init__(self, entry: str, settings: object) -> None:
        """Prepare a process that calls ``entry`` (``"module:function"``).

        The function takes the child's end of the connection and ``settings``; it calls
        ``run_engine`` or sends ``EngineRefused``.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, self._child_connection = context.Pipe()
        arguments = entry, self._child_connection, settings
        self._process = context.Process(
            target=_child_main, args=arguments, name="memplus-engine", daemon=True
        )
        self._outbox: queue.SimpleQueue[tuple[Message, ...] | None] = queue.SimpleQueue()
        self._start_lock = threading.Lock()
        self._is_stopped = False
        # a full pipe must not block the caller's event loop, nor deadlock both processes
        self._sender = threading.Thread(target=self._send_batches, daemon=True)

    def start(self) -> EngineReady:
        """Start the process and wait until the engine is loaded.

        Raises:
            EngineStartError: the engine could not be made, or was stopped; the message says why.
            EngineFailedError: the machine failed.
        """
        with self._start_lock:
            if self._is_stopped:
                raise EngineStartError("the engine process was stopped before it started")
            start_shielded(self._process)
        self._child_connection.close()
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            message = f"the engine process died while loading (exit {code})"
            raise EngineFailedError(message) from None
        except BaseException:  # a signal to this process, which the child does not get
            self.kill()
            self._process.join()
            raise
        if isinstance(answer, EngineRefused):
            self._process.join()
            raise (EngineFailedError if answer.is_failure else EngineStartError)(answer.message)
        assert isinstance(answer, EngineReady)
        self._sender.start()
        return answer

    def send(self, *messages: Message) -> None:
        """Queue messages; the engine reads them together before one of its next steps.

        A prompt that several of them have in common is sent once.
        """
        self._outbox.put(messages)

    def receive(self) -> Answer:
        """Wait for the next message; EOFError if the process has ended.

        Call it in a separate thread: an event loop would make the pipe non-blocking, and that
        would truncate long messages.
        """
        try:
            output = self._connection.recv()
        except OSError:
            raise EOFError("the engine process has ended") from None
        assert isinstance(output, Answer)
        return output

    def kill(self) -> None:
        """Kill the process at once."""
        self._process.kill()

    def stop(self, timeout_s: float = STOP_S) -> None:
        """End the process: ask, wait this long, then kill; kill it at once if it is loading.

        Unfinished requests are lost. A process that was not started can no longer start.
        """
        with self._start_lock:
            self._is_stopped = True
            if self._process.pid is None:
                return
        self._outbox.put(None)
        if self._sender.is_alive():
            deadline = time.monotonic() + timeout_s
            self._sender.join(timeout_s)
            self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self.kill()
        # a process that waits for a device cannot be killed
        self._process.join(timeout_s)

    def _send_batches(self) -> None:
        closing = False
        while not closing:
            batch = [self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get())
            closing = None in batch
            try:
                self._connection.send([m for messages in batch if messages for m in messages])
                if closing:
                    self._connection.send(None)
            except OSError:
                return  # the process has ended: receive() reports it


class EngineLoop:
    """Serves one connection with one engine; a second thread sends heartbeats."""

    def __init__(self, engine: StepEngine, connection: Connection) -> None:
        self._engine, self._connection = engine, connection
        self._send_lock = threading.Lock()
        self._ended = threading.Event()
        self._patches = PatchLoading(engine, self._send)

    def run(self) -> None:
        """Serve until the other side sends ``None`` or closes."""
        heart = threading.Thread(target=self._beat, daemon=True)
        try:
            self._send(EngineReady(self._engine.limits))
            heart.start()
            while self._take_messages():
                self._engine.progress.mark()
                self._send(self._engine.step())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the other side is gone: nobody waits for an answer
        finally:
            self._ended.set()
            self._patches.close()
            if heart.is_alive():
                # let it end before the interpreter exits; a full pipe may block it for ever
                heart.join(HEARTBEAT_S)

    def _take_messages(self) -> bool:
        """Apply new messages, and wait for one if there is no work; False at the end."""
        engine = self._engine
        while not engine.has_work or self._connection.poll():
            if not engine.has_work:
                engine.check_idle()
            engine.progress.rest()
            batch: list[Message] | None = self._connection.recv()
            if batch is None:
                return False
            engine.progress.mark()
            refused = self._apply(batch)
            # after an abort there may be no further step, which would report the gauges
            if refused or not engine.has_work:
                self._send(StepOutput(tuple(refused), engine.statistics()))
        return True

    def _apply(self, batch: list[Message]) -> list[TokenOutput]:
        refused = []
        for message in batch:
            if isinstance(message, Abort):
                self._engine.abort(message.request_id)
                continue
            if isinstance(message, LoadPatch | UnloadPatch):
                self._patches.submit(message)
                continue
            if isinstance(message, DescribeMemory):
                # reading the counts of a large table must not delay a step
                threading.Thread(target=self._describe, daemon=True).start()
                continue
            try:
                self._engine.add(message)
            except RequestError as error:
                refused.append(refused_output(message.request_id, error))
        return refused

    def _describe(self) -> None:
        try:
            report = MemoryReport(self._engine.memory_report())
        except Exception as error:
            logger.exception("the value tables could not be described")
            report = MemoryReport(error=type(error).__name__)
        with contextlib.suppress(OSError):  # the loop notices it too
            self._send(report)

    def _send(self, message: Answer | EngineReady) -> None:
        with self._send_lock:
            self._connection.send(message)

    def _beat(self) -> None:
        beat = time.monotonic()
        while not self._ended.wait(HEARTBEAT_S):
            last, beat = beat, time.monotonic()
            if beat - last > HEARTBEAT_S + PAUSE_S:
                self._engine.progress.skip()
            try:
                self._send(Heartbeat(self._engine.progress.stalled_s))
            except OSError:
                return  # the loop notices it too


def run_engine(engine: StepEngine, connection: Connection) -> None:
    """Serve the other end of ``connection`` until it sends ``None`` or closes."""
    EngineLoop(engine, connection).run()


def _child_main(entry: str, connection: Connection, settings: object) -> None:
    module, function = entry.split(":")
    getattr(importlib.import_module(module), function)(connection, settings)
