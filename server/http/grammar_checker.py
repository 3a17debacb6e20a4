"""Checks the grammars of requests in a separate process before the engine gets them."""

import asyncio
import logging
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from engine.errors import RequestError
from engine.request import RequestLimits
from engine.sampling.grammar import Grammar
from engine.shielded_start import start_shielded
from server.grammar_worker import TRIAL_S, work
from server.http.errors import ApiError, OverloadedError

logger = logging.getLogger(__name__)
_LONGEST_WAIT_S = 2 * TRIAL_S
_STARTING_S = 30.0
# longer than a trial on a busy machine
_ANSWERING_S = 10 * TRIAL_S
_MOST_PASSED = 128


class GrammarChecker:
    """Checks one grammar at a time in a worker process, which it restarts if it dies.

    The worker starts with ``start``, or with the first check.
    """

    def __init__(self, folder: Path, limits: RequestLimits) -> None:
        """``folder`` has the tokenizer of the model with these ``limits``."""
        self._arguments = folder, limits
        self._lock = threading.Lock()  # for the worker and is_stopped
        self._worker: tuple[BaseProcess, Connection] | None = None
        self._is_ready = self._is_stopped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-checker")
        self._passed: dict[Grammar, None] = {}  # the last used is last

    def start(self) -> None:
        """Start the worker in the background, so that the first check is not slow."""
        self._thread.submit(self._connected)  # the first check reports a failure

    async def check(self, grammar: Grammar) -> None:
        """Return if the engine can compile the grammar.

        Raises:
            RequestError: it is wrong, or too complex.
            OverloadedError: too many grammars wait to be checked.
            ApiError: (500) the worker failed.
        """
        if grammar not in self._passed:
            problem = await self._problem(grammar)
            if problem is not None:
                raise RequestError(grammar.param, problem)
        self._passed.pop(grammar, None)
        self._passed[grammar] = None
        if len(self._passed) > _MOST_PASSED:
            del self._passed[next(iter(self._passed))]

    def stop(self) -> None:
        """End the worker; checks that wait fail."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._is_stopped = True
        self._end()

    async def _problem(self, grammar: Grammar) -> str | None:
        asked = asyncio.get_running_loop().run_in_executor(self._thread, self._ask, grammar)
        try:
            done, _ = await asyncio.wait({asked}, timeout=_LONGEST_WAIT_S)
            if not done and not self._is_ready:  # a worker starts: the first, or a replacement
                done, _ = await asyncio.wait({asked}, timeout=_STARTING_S)
            if not done:
                raise OverloadedError
            return await asked
        except (EOFError, OSError):
            logger.exception("the grammar checker failed")
            raise ApiError(500, "the grammar checker failed", "server_error") from None
        finally:
            asked.cancel()

    def _ask(self, grammar: Grammar) -> str | None:
        """The problem of a grammar; if the worker dies, its replacement tries once more."""
        for _ in range(2):
            connection = self._connected()
            try:
                connection.send(grammar)
                return _answer(connection, _ANSWERING_S)
            except (EOFError, OSError):
                logger.warning("the process that checks grammars has died or hangs; replacing it")
                self._end()
        return f"the {grammar.kind} is refused: the process that checks it died twice"

    def _connected(self) -> Connection:
        """The connection to a worker that is ready."""
        with self._lock:
            if self._is_stopped:
                raise EOFError("the grammar checker was stopped")
            if self._worker is None:
                self._worker = self._new_worker()
            _, connection = self._worker
        if not self._is_ready:
            try:
                _answer(connection, _STARTING_S)
            except (EOFError, OSError):
                self._end()
                raise
            self._is_ready = True
        return connection

    def _new_worker(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(theirs, *self._arguments), name="memplus-grammars", daemon=True
        )
        start_shielded(process)
        theirs.close()
        return process, ours

    def _end(self) -> None:
        with self._lock:
            self._is_ready = False
            if self._worker is not None:
                process, _ = self._worker
                self._worker = None
                process.kill()
                process.join()


def _answer(connection: Connection, timeout_s: float) -> str | None:
    if not connection.poll(timeout_s):
        raise EOFError("no answer")
    answer: str | None = connection.recv()
    return answer
