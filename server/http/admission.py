"""Places for prompts: reserved before any work is done for a request, or refused at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import RequestError
from server.http.errors import OverloadedError


class Admission:
    """Counts the prompts that are under way, waiting ones included."""

    def __init__(self, capacity: int, on_refused: Callable[[], None]) -> None:
        self._capacity = capacity
        self._on_refused = on_refused
        self.num_admitted = 0

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold ``count`` places while the block runs.

        Raises:
            OverloadedError: there are not so many free places.
            RequestError: there never will be.
        """
        if count > self._capacity:
            message = f"{count} prompts in one request, the server takes {self._capacity}"
            raise RequestError("prompt", message)
        if self.num_admitted + count > self._capacity:
            self._on_refused()
            raise OverloadedError
        self.num_admitted += count
        try:
            yield
        finally:
            self.num_admitted -= count
