"""Admission control: a bounded number of prompts in flight; more are rejected at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import RequestError
from server.http.errors import OverloadedError


class Admission:
    """Counts the prompts in flight, running and waiting, up to a capacity."""

    def __init__(self, capacity: int, on_rejected: Callable[[], None]) -> None:
        self._capacity = capacity
        self._on_rejected = on_rejected
        self.num_admitted = 0

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Admit ``count`` prompts while the ``with`` block runs.

        Raises:
            OverloadedError: the capacity left is less than ``count``.
            RequestError: the whole capacity is less than ``count``.
        """
        if count > self._capacity:
            message = f"at most {self._capacity} prompts (with samples) per request, not {count}"
            raise RequestError("prompt", message)
        if self.num_admitted + count > self._capacity:
            self._on_rejected()
            raise OverloadedError
        self.num_admitted += count
        try:
            yield
        finally:
            self.num_admitted -= count
