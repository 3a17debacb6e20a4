"""Compiles the grammars of requests in a background thread, before the scheduler sees them."""

import logging
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from engine.errors import RequestError
from engine.model.row_patches import PatchSet
from engine.request import Request
from engine.sampling.masks import Grammars, TokenMask

logger = logging.getLogger(__name__)


class Compiled(NamedTuple):
    """A request whose grammar has a mask, or an error; and its row patches."""

    request: Request
    patches: PatchSet
    result: TokenMask | RequestError


class CompilingRequests:
    """The requests that wait for their masks, in the order of arrival.

    A grammar is compiled once it fits in memory, when those in use leave enough free.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._queued: dict[str, tuple[Request, PatchSet]] = {}
        self._compiling: dict[str, tuple[Request, PatchSet, Future[TokenMask]]] = {}

    def __len__(self) -> int:
        return len(self._queued) + len(self._compiling)

    def add(self, request: Request, patches: PatchSet = ()) -> None:
        """Begin to compile the grammar of a request, or queue it."""
        self._queued[request.request_id] = request, patches
        self._compile_queued()

    def abort(self, request_id: str) -> None:
        """Forget a request; do nothing if none with this id waits."""
        self._queued.pop(request_id, None)
        if request_id in self._compiling:
            *_, future = self._compiling.pop(request_id)
            future.cancel()

    def take(self, timeout_s: float = 0.0) -> list[Compiled]:
        """Remove and return the requests whose compilation has ended.

        If there is none, wait for one, at most for ``timeout_s``.
        """
        # with a timeout the engine has nothing else to do, so no running request will free memory
        self._compile_queued(at_least=1 if timeout_s and not self._compiling else 0)
        if timeout_s and self._compiling:
            wait([one[-1] for one in self._compiling.values()], timeout_s, FIRST_COMPLETED)
        ended = [one for one in self._compiling.values() if one[-1].done()]
        for request, *_ in ended:
            del self._compiling[request.request_id]
        return [Compiled(request, patches, _result(request, f)) for request, patches, f in ended]

    def _compile_queued(self, at_least: int = 0) -> None:
        if not self._queued:
            return
        begun = Counter(
            request.grammar for request, _, future in self._compiling.values() if not future.done()
        )
        # read after ``begun``: a copy that is made meanwhile counts twice, and never not at all
        count = max(self._grammars.num_free - begun.total(), at_least)
        for request_id, (request, patches) in list(self._queued.items()):
            grammar = request.grammar
            assert grammar is not None
            if self._grammars.copies_left(grammar) <= begun[grammar]:
                if count <= 0:
                    continue
                count -= 1
            begun[grammar] += 1
            del self._queued[request_id]
            future = self._thread.submit(self._grammars.compile, grammar)
            self._compiling[request_id] = request, patches, future


def _result(request: Request, future: "Future[TokenMask]") -> TokenMask | RequestError:
    error = future.exception()
    if error is None or isinstance(error, RequestError):
        return error or future.result()
    logger.error("the grammar of %s failed", request.request_id, exc_info=error)
    assert request.grammar is not None
    return RequestError(request.grammar.param, f"{type(error).__name__} in the grammar")
