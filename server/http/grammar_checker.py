"""Checks the grammars of requests in a process of its own before the engine gets them."""

import asyncio
import logging
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from engine.errors import RequestError
from engine.request import RequestLimits
from engine.sampling.grammar import Grammar
from server.grammar_worker import TRIAL_S, work
from server.http.errors import ApiError, OverloadedError

logger = logging.getLogger(__name__)
_LONGEST_WAIT_S = 2 * TRIAL_S
# the first check also starts the process
_STARTING_S = 30.0
_MOST_PASSED = 128


class GrammarChecker:
    """Tries one grammar at a time; a process starts with the first, and replaces one that died."""

    def __init__(self, folder: Path, limits: RequestLimits) -> None:
        """``folder`` has the tokenizer of the model with these ``limits``."""
        self._arguments = folder, limits
        self._worker: tuple[BaseProcess, Connection] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-checker")
        self._passed: dict[Grammar, None] = {}  # the last used is last

    async def check(self, grammar: Grammar) -> None:
        """Return if the engine can compile the grammar.

        Raises:
            RequestError: it is wrong, or too complex.
            OverloadedError: too many grammars wait to be checked.
            ApiError: (500) the process failed.
        """
        if grammar not in self._passed:
            loop = asyncio.get_running_loop()
            wait_s = _LONGEST_WAIT_S if self._worker is not None else _STARTING_S
            try:
                asked = loop.run_in_executor(self._thread, self._ask, grammar)
                problem = await asyncio.wait_for(asked, wait_s)
            except TimeoutError:
                raise OverloadedError from None
            except (EOFError, OSError):
                logger.exception("the grammar checker failed")
                raise ApiError(500, "the grammar checker failed", "server_error") from None
            if problem is not None:
                raise RequestError(grammar.param, problem)
        self._passed.pop(grammar, None)
        self._passed[grammar] = None
        if len(self._passed) > _MOST_PASSED:
            del self._passed[next(iter(self._passed))]

    def stop(self) -> None:
        """End the process; checks that wait fail."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _ask(self, grammar: Grammar) -> str | None:
        try:
            worker = self._worker or self._start()
            self._worker = worker
            worker[1].send(grammar)
            if not worker[1].poll(_STARTING_S):
                raise EOFError("no answer")
            problem: str | None = worker[1].recv()
            return problem
        except (EOFError, OSError):
            self._end()
            raise

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(theirs, *self._arguments), name="memplus-grammars", daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def _end(self) -> None:
        if self._worker is not None:
            process, _ = self._worker
            self._worker = None
            process.kill()
            process.join()
