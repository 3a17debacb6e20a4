"""The engine in a process of its own: the messages, the loop inside, the handle outside.

The process that holds the handle never imports torch: the engine is built in the child, by an entry
function that is named by a string.
"""

import importlib
import multiprocessing
import queue
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from engine.errors import RequestError
from engine.progress import Progress
from engine.request import (
    EngineStatistics,
    Request,
    RequestLimits,
    StepOutput,
    TokenOutput,
)

# how often a process that has nothing else to say tells that it lives
HEARTBEAT_S = 0.5
# a wait that took so much longer means that the process itself was stopped meanwhile
PAUSE_S = 1.0


@dataclass(frozen=True)
class Abort:
    """Forget this request."""

    request_id: str


Message = Request | Abort


@dataclass(frozen=True)
class EngineReady:
    """The engine is loaded and answers from now on."""

    limits: RequestLimits


@dataclass(frozen=True)
class EngineRefused:
    """The engine could not be made; ``message`` is for the one who asked for it."""

    message: str


@dataclass(frozen=True)
class Heartbeat:
    """The process lives, and how long it made no progress beyond what its work may take.

    0 if it waits; see ``engine.progress``.
    """

    stalled_s: float


class StepEngine(Protocol):
    """What the loop needs of an engine; ``engine.engine.Engine`` has it."""

    limits: RequestLimits

    @property
    def progress(self) -> Progress: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> StepOutput: ...
    def statistics(self) -> EngineStatistics: ...
    def check_idle(self) -> None: ...


class EngineStartError(Exception):
    """The engine process refused its settings or its model, or died before it was ready."""


class EngineLostError(Exception):
    """The engine process has ended, and no restarts are left."""


class EngineProcess:
    """A handle on an engine that runs elsewhere. ``send`` never blocks; ``receive`` may."""

    def __init__(self, entry: str, settings: object) -> None:
        """Prepare a process that calls ``entry`` (``"module:function"``).

        The function gets the process's end of the connection and ``settings``, and ends with
        ``run_engine`` or by sending ``EngineRefused``.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, self._child_connection = context.Pipe()
        self._process = context.Process(
            target=_child_main,
            args=(entry, self._child_connection, settings),
            name="memplus-engine",
            daemon=True,
        )
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._start_lock = threading.Lock()
        self._is_stopped = False
        # a full pipe must not stop the event loop of the caller, nor lock both sides
        self._sender = threading.Thread(target=self._send_batches, daemon=True)

    def start(self) -> EngineReady:
        """Start the process and wait until the engine is loaded.

        Raises:
            EngineStartError: it could not be made, or was stopped; the message says why.
        """
        with self._start_lock:
            if self._is_stopped:
                raise EngineStartError("the engine process was stopped before it started")
            self._process.start()
        self._child_connection.close()
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise EngineStartError(f"the engine process died while loading (exit {code})") from None
        except BaseException:  # a signal to this process, which the child does not hear
            self.kill()
            self._process.join()
            raise
        if isinstance(answer, EngineRefused):
            self._process.join()
            raise EngineStartError(answer.message)
        assert isinstance(answer, EngineReady)
        self._sender.start()
        return answer

    def send(self, message: Message) -> None:
        """Hand a message over; it reaches the engine before one of its next steps."""
        self._outbox.put(message)

    def receive(self) -> StepOutput | Heartbeat:
        """Wait for the next step's output, or a sign of life.

        For a thread of its own: an event loop that watched the pipe would make it non-blocking,
        and a long message would then be torn.

        Raises:
            EOFError: the process has ended.
        """
        try:
            output = self._connection.recv()
        except OSError:
            raise EOFError("the engine process has ended") from None
        assert isinstance(output, StepOutput | Heartbeat)
        return output

    def kill(self) -> None:
        """End the process now, whatever it does."""
        self._process.kill()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the process: ask, wait, then kill. Requests under way are lost.

        One that is still loading is killed; one that was not started never will be.
        """
        with self._start_lock:
            self._is_stopped = True
            if self._process.pid is None:
                return
        self._outbox.put(None)
        if self._sender.is_alive():
            self._sender.join(timeout_s)
            self._process.join(timeout_s)
        if self._process.is_alive():
            self.kill()
        # one that waits for a device cannot even be killed
        self._process.join(timeout_s)

    def _send_batches(self) -> None:
        closing = False
        while not closing:
            batch = [self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get())
            closing = None in batch
            try:
                self._connection.send([message for message in batch if message is not None])
                if closing:
                    self._connection.send(None)
            except OSError:
                return  # the process has ended, which the receiving side reports


class EngineLoop:
    """Serves one connection with one engine; a second thread sends the signs of life."""

    def __init__(self, engine: StepEngine, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._send_lock = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> None:
        """Serve until the other side says ``None`` or closes."""
        heart = threading.Thread(target=self._beat, daemon=True)
        try:
            self._send(EngineReady(self._engine.limits))
            heart.start()
            while self._take_messages():
                self._engine.progress.mark()
                self._send(self._engine.step())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the other side is gone, and with it everyone who waits for an answer
        finally:
            self._ended.set()
            if heart.is_alive():
                # the interpreter's end would tear it out of whatever it calls; a full pipe that
                # nobody reads may hold it for good
                heart.join(HEARTBEAT_S)

    def _take_messages(self) -> bool:
        """Apply what has come, waiting where there is nothing to step; False at the end."""
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
            # an abort may leave nothing to step, and the gauges must say so
            if refused or not engine.has_work:
                self._send(StepOutput(tuple(refused), engine.statistics()))
        return True

    def _apply(self, batch: list[Message]) -> list[TokenOutput]:
        refused = []
        for message in batch:
            if isinstance(message, Abort):
                self._engine.abort(message.request_id)
                continue
            try:
                self._engine.add(message)
            except RequestError as error:
                output = TokenOutput(message.request_id, finish_reason="error", error=str(error))
                refused.append(output)
        return refused

    def _send(self, message: StepOutput | Heartbeat | EngineReady) -> None:
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
                return  # the loop finds out by itself


def run_engine(engine: StepEngine, connection: Connection) -> None:
    """Serve the other end of ``connection`` until it says ``None`` or closes."""
    EngineLoop(engine, connection).run()


def _child_main(entry: str, connection: Connection, settings: object) -> None:
    # a signal to the process group reaches both processes; the parent decides what it means
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    module, function = entry.split(":")
    getattr(importlib.import_module(module), function)(connection, settings)
